// The little Markdown that answers use: fenced code, `code` and **bold**. Builds nodes, never HTML from a string.
function inline(parent, text) {
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    const mark = part.startsWith("`") ? "code" : part.startsWith("**") ? "strong" : "";
    if (!mark || part.length < 3) parent.append(part);
    else {
      const child = document.createElement(mark);
      child.textContent = mark === "code" ? part.slice(1, -1) : part.slice(2, -2);
      parent.append(child);
    }
  }
}

export function render(target, text) {
  const nodes = [];
  text.split(/^```/m).forEach((part, i) => {
    if (i % 2) {
      const code = document.createElement("code");
      code.textContent = part.replace(/^[^\n]*\n?/, "").trimEnd();
      const block = document.createElement("pre");
      block.tabIndex = 0; // scrolls sideways by keyboard, too
      block.append(code);
      nodes.push(block);
      return;
    }
    for (const paragraph of part.split(/\n{2,}/)) {
      if (!paragraph.trim()) continue;
      const p = document.createElement("p");
      inline(p, paragraph.replace(/^\n+|\n+$/g, ""));
      nodes.push(p);
    }
  });
  target.replaceChildren(...nodes);
}
