// A chat over the server's OpenAI API: streams answers, keeps the conversation of this tab, shows what an answer cost.
import { readEvents } from "./events.js";
import { render } from "./render.js";

const $ = (id) => document.getElementById(id);
const messages = [];
let model = null;
let running = null; // AbortController of the answer that is streaming
let session = newSession();

function newSession() {
  // randomUUID is there on https and localhost only; a name that no other tab has is all that is needed.
  return crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function number(id) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value; // left out: the server's own
}

function announce(text) { $("status").textContent = text; }

function follow(change) {
  const scroll = $("scroll");
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

function append(role) {
  $("empty").hidden = true;
  const item = element("li", `message ${role}`);
  follow(() => $("log").append(item));
  return item;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
}

function headers() {
  // The session lets a router in front of several servers send a conversation to the same one.
  const key = $("key").value;
  return { "content-type": "application/json", "x-session-id": session, ...(key && { authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  if (response.status === 401) $("key-field").hidden = false;
  const text = await response.text();
  try { return JSON.parse(text).error.message; } catch { return `${response.status} ${response.statusText}`; }
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 1)} MB`;

function figures(times, usage, why) {
  const count = usage?.completion_tokens ?? times.length;
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  if (times.length > 1) {
    // Events after the first, in tokens where the server counted them: an event may hold several.
    const seconds = (times.at(-1) - times[0]) / 1000;
    if (seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (times.length) parts.push(`first after ${((times[0] - times.start) / 1000).toFixed(2)} s`);
  if (why) parts.push(why);
  return parts.join(" · ");
}

function showMemory(usage) {
  const kept = usage?.attnspan?.kv_bytes;
  const dense = usage?.attnspan?.kv_bytes_dense;
  if (!kept) return;
  $("memory").hidden = false;
  $("memory-text").textContent = dense ? `KV ${megabytes(kept)} of ${megabytes(dense)} dense` : `KV ${megabytes(kept)}`;
  $("memory-bar").hidden = !dense;
  if (dense) $("memory-bar").value = kept / dense;
}

async function answer() {
  const controller = new AbortController();
  setRunning(controller);
  const item = append("assistant");
  const text = element("div", "text");
  item.append(text);
  item.classList.add("busy");
  item.setAttribute("aria-busy", "true");
  let content = "", usage = null, why = "", error = "";
  const times = [];
  times.start = performance.now();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: controller.signal,
      body: JSON.stringify({
        model, messages, stream: true, stream_options: { include_usage: true },
        temperature: number("temperature"), max_tokens: number("tokens"),
      }),
    });
    if (!response.ok) throw new Error(await failure(response));
    let whole = false;
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") { whole = true; break; }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (choice?.finish_reason === "length") why = "cut at the most tokens";
      if (choice?.delta?.content) {
        times.push(performance.now());
        content += choice.delta.content;
        follow(() => render(text, content));
      }
    }
    if (!whole) throw new Error("The server ended the answer early.");
  } catch (problem) {
    if (problem.name === "AbortError") why = "stopped";
    else error = problem instanceof TypeError ? "The server cannot be reached." : problem.message;
  }
  item.classList.remove("busy");
  item.removeAttribute("aria-busy");
  setRunning(null);
  if (controller.discarded) return;
  if (content || !error) {
    messages.push({ role: "assistant", content });
    follow(() => item.append(element("p", "figures", figures(times, usage, why))));
    showMemory(usage);
    announce(`Answer: ${content}`);
  } else item.remove();
  if (error) showError(error);
  $("input").focus();
}

function showError(text) {
  const item = append("error");
  item.setAttribute("role", "alert");
  const again = element("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    item.previousElementSibling?.matches(".assistant") && item.previousElementSibling.remove();
    while (messages.at(-1)?.role === "assistant") messages.pop();
    item.remove();
    answer();
  });
  item.append(text, again);
}

function send(text) {
  if (running || !text.trim()) return;
  if (messages.at(-1)?.role === "user") messages.pop(); // its answer failed, and another question follows
  messages.push({ role: "user", content: text.trim() });
  append("user").textContent = text.trim();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  answer();
}

function stop() { running?.abort(); }

function clear() {
  if (running) running.discarded = true;
  stop();
  messages.length = 0;
  session = newSession();
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("memory").hidden = true;
  $("input").focus();
}

const THEMES = { system: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

function setTheme(name) {
  const [sign, words] = THEMES[name];
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = sign;
  $("theme").title = `Theme: ${words}`;
  $("theme").setAttribute("aria-label", `Theme: ${words}`);
  localStorage.setItem("theme", name);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = $("input").value;
  $("input").value = "";
  $("send").disabled = true;
  send(text);
});
$("input").addEventListener("input", () => { $("send").disabled = !$("input").value.trim(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", clear);
$("examples").addEventListener("click", (event) => { if (event.target.matches("button")) send(event.target.textContent); });
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(localStorage.getItem("theme") ?? "system") + 1) % names.length]);
});
setTheme(localStorage.getItem("theme") in THEMES ? localStorage.getItem("theme") : "system");

$("key").addEventListener("change", loadModel);

async function loadModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    model = (await response.json()).data[0].id;
    $("model").textContent = model;
    document.title = `${model} · attnspan`;
    announce(`Ready: ${model}`);
  } catch (problem) {
    announce(problem.message);
    $("model").textContent = problem.message;
  }
}

loadModel();
