"""use_plan: a transformers model under a plan, against PyTorch in fp32 with the plan as a mask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, array
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from attnspan.export.torch_reference import TorchReference
from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.uniform import uniform
from attnspan.plugins.trt_sparse_attn.attention import use_plan

PROMPT, STEPS, N_MAX = 200, 3, 256
TOKENS = np.random.default_rng(0).integers(0, 256, PROMPT + STEPS).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), head_dim=64)


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return uniform(ModelShape.from_config(folder), 0.5, N_MAX, 0.25)


def load(folder: Path, plan: Plan, dtype: torch.dtype = torch.float16) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    use_plan(model, plan)
    return model


@pytest.fixture(scope="module")
def model(folder: Path, plan: Plan) -> Any:
    return load(folder, plan)


def ids(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


@torch.inference_mode()
def test_a_prompt_and_steps_see_what_the_plan_says(folder: Path, plan: Plan, model: Any) -> None:
    assert plan.spans(PROMPT).min() < PROMPT - 64, "the plan must leave something out"
    spans = [plan.spans(max(PROMPT, i + 1)) for i in range(PROMPT + STEPS)]
    reference = TorchReference(folder, plan, "float32")
    want = array(reference.logits(reference.hidden(TOKENS, torch.tensor(np.array(spans)))))
    out = model(ids([TOKENS[:PROMPT]]))
    got = [out.logits[0]]
    for token in TOKENS[PROMPT:]:
        out = model(ids([[token]]), past_key_values=out.past_key_values)
        got.append(out.logits[0])
    assert out.past_key_values.length.tolist() == [PROMPT + STEPS]
    assert np.abs(array(torch.cat(got)) - want).max() <= 1e-2 * np.abs(want).max()


@torch.inference_mode()
def test_without_a_cache_a_prompt_gives_the_same(model: Any) -> None:
    prompt = ids([TOKENS[:PROMPT]])
    without = model(prompt, use_cache=False)
    assert without.past_key_values is None
    assert torch.equal(without.logits, model(prompt).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_changes_nothing(model: Any, side: str) -> None:
    rows = [TOKENS[:150], TOKENS[20:29]]
    pads = [[7] * (150 - len(row)) for row in rows]
    batch = ids([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    mask = ids([[0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
                for row, pad in zip(rows, pads, strict=True)])  # fmt: skip
    places = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(batch, attention_mask=mask, position_ids=places)
    assert out.past_key_values.length.tolist() == [150, 9]
    for b, row in enumerate(rows):
        alone = array(model(ids([row])).logits[0])
        got = array(out.logits[b])[array(mask[b]).astype(bool)]
        assert np.abs(got - alone).max() <= 2e-3 * np.abs(alone).max()


@torch.inference_mode()
def test_generate_continues_each_row_of_a_padded_batch(model: Any) -> None:
    rows = [TOKENS[:135], TOKENS[50:60]]
    length = max(map(len, rows))
    batch = ids([[7] * (length - len(row)) + row for row in rows])
    mask = ids([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)[:, length:]
    for b, row in enumerate(rows):
        alone = model.generate(ids([row]), attention_mask=torch.ones_like(ids([row])), **options)
        assert alone[0, len(row) :].tolist() == together[b].tolist()


def test_what_does_not_fit_is_refused(folder: Path, plan: Plan, model: Any) -> None:
    with pytest.raises(UserError, match="kv_heads 1 against 2"):
        use_plan(model, uniform(ModelShape("other", 2, 4, 1), 0.5, N_MAX))
    with pytest.raises(UserError, match=r"query's type is torch\.float32"):
        load(folder, plan, torch.float32)(ids([TOKENS[:9]]))
    with pytest.raises(UserError, match="0 tokens and 257 more make 257: the plan is for n_max = 256"):
        model(ids([[1] * 257]))
    with pytest.raises(UserError, match="attention_mask has gaps"):
        model(ids([[1] * 4]), attention_mask=ids([[1, 0, 1, 1]]))
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)
    with pytest.raises(UserError, match="DynamicCache that holds tokens"):
        model(ids([[1]]), past_key_values=foreign)
    with pytest.raises(UserError, match="call the module that use_plan was given"):
        model.model(ids([[1]]))
    assert torch.isfinite(model(ids([[1, 2]])).logits).all(), "a call that failed leaves nothing behind"


def test_layers_with_sliding_windows_are_refused(tmp_path: Path, plan: Plan) -> None:
    mistral = save_tiny_model(tmp_path, "mistral", head_dim=64, sliding_window=64)
    model = load(mistral, uniform(ModelShape.from_config(mistral), 0.5, N_MAX))
    with pytest.raises(UserError, match="layer 0 has a sliding window of 64: attnspan runs full attention only"):
        model(ids([[1, 2, 3]]))
