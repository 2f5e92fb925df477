"""plan.json: strict reading, with errors that name the field, and readable writing."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attnspan.planner.cost import index_table, state_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.plan import SCHEMA, Plan, ladder
from attnspan.planner.rules import HeadRule, LshParams, check_number
from attnspan.planner.shape import ModelShape

DENSITY_TOLERANCE = 1e-5
REQUIRED = ("schema", "model", "n_max", "sink", "block", "density", "rules")
OPTIONAL = ("windows", "indexes", "state_bytes", "provenance", "predicted_loss", "solver_gap", "validation")


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The content of plan.json, keys in the order they are written."""
    indexes = index_table(plan)
    return {
        "schema": SCHEMA,
        "model": dataclasses.asdict(plan.model),
        "n_max": plan.n_max,
        "sink": plan.sink,
        "block": plan.block,
        "density": {str(n): round(plan.density(n), 6) for n in ladder(plan.n_max)},
        **({"windows": list(plan.windows)} if plan.windows else {}),
        # What the indexes of sampled heads take.
        **({"indexes": indexes, "state_bytes": state_bytes(plan)} if indexes else {}),
        "predicted_loss": {str(n): loss for n, loss in sorted(plan.predicted_loss.items())},
        "solver_gap": plan.solver_gap,
        "provenance": dict(plan.provenance),
        "validation": dict(plan.validation),
        "rules": [[_rule_to_dict(rule) for rule in layer] for layer in plan.rules],
    }


def _rule_to_dict(rule: HeadRule) -> dict[str, Any]:
    out: dict[str, Any] = {"mode": rule.mode, "alpha": _short(rule.alpha), "beta": _short(rule.beta)}
    if rule.lsh is not None:
        out["lsh"] = {key: value for key, value in dataclasses.asdict(rule.lsh).items() if value is not None}
        if rule.lsh.index == "sketch":
            del out["lsh"]["min_inclusion"]  # it takes none
        if not rule.lsh.guard:
            del out["lsh"]["guard"]
    return out


def _short(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def dump(data: Mapping[str, Any]) -> str:
    """JSON text with one head's rule per line, so that plans of 640 heads stay readable and diff well."""
    parts = []
    for key, value in data.items():
        text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
        if key == "rules":
            layers = (",\n    ".join(json.dumps(rule, allow_nan=False) for rule in layer) for layer in value)
            text = "[\n   [" + "],\n   [".join(layers) + "]\n  ]"
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def check_keys(where: str, data: object, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return data when it is an object with the required keys and no unknown one; hints at near matches."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {data!r:.60}: must be an object")
    required, known = list(required), [*required, *optional]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{where} has the unknown key {key!r}: {hint}")
    missing = [key for key in required if key not in data]
    if missing:
        raise UserError(f"{where} lacks {', '.join(map(repr, missing))}")
    return dict(data)


def plan_from_dict(data: Mapping[str, Any], where: str) -> Plan:
    """Check the content of plan.json and build the plan; UserError names the place and the value."""
    if isinstance(data, Mapping) and "alphas" in data and "betas" in data:
        raise UserError(f"{where} is a published MoA plan: turn it into a plan with `attnspan plan import`")
    schema = data.get("schema", SCHEMA) if isinstance(data, Mapping) else SCHEMA
    if type(schema) is not int or schema != SCHEMA:
        raise UserError(f"{where} has schema {schema!r:.40}: this version of attnspan reads {SCHEMA}; make the plan again")
    top = check_keys(where, data, REQUIRED, OPTIONAL)
    names = [f.name for f in dataclasses.fields(ModelShape)]
    model = check_keys(f"{where}: model", top["model"], names[:4], names[4:])
    rules = top["rules"]
    if not isinstance(rules, list) or not all(isinstance(layer, list) for layer in rules):
        raise UserError(f"{where}: rules is {rules!r:.60}: must be a list of layers, each a list of heads")
    try:
        plan = Plan(
            model=ModelShape(**model),
            n_max=top["n_max"],
            rules=[[_rule_from_dict(f"rules[{i}][{h}]", rule) for h, rule in enumerate(layer)] for i, layer in enumerate(rules)],
            sink=top["sink"],
            block=top["block"],
            provenance=_object("provenance", top.get("provenance", {})),
            predicted_loss=_by_length("predicted_loss", top.get("predicted_loss", {})),
            solver_gap=top.get("solver_gap"),
            validation=_object("validation", top.get("validation", {})),
            windows=top.get("windows", ()),
        )
        _check_density(plan, _by_length("density", top["density"]))
        for name, real in (("indexes", index_table(plan)), ("state_bytes", state_bytes(plan))):
            if name in top and top[name] != real:
                raise UserError(f"{name} is {top[name]!r:.200}: the rules give {real!r}; remove it, or make the plan again")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return plan


def _rule_from_dict(where: str, data: object) -> HeadRule:
    rule = check_keys(where, data, ("mode", "alpha", "beta"), ("lsh",))
    try:
        lsh = rule.get("lsh")
        if lsh is not None:
            names = [f.name for f in dataclasses.fields(LshParams)]
            lsh = LshParams(**check_keys("lsh", lsh, names[:2], names[2:]))
        return HeadRule(rule["mode"], rule["alpha"], rule["beta"], lsh)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {value!r:.60}: must be an object")
    return dict(value)


def _by_length(name: str, value: object) -> dict[int, float]:
    out = {}
    for key, number in _object(name, value).items():
        if not re.fullmatch(r"[1-9][0-9]{0,9}", str(key)):
            raise UserError(f"{name} has the key {key!r}: must be a length in tokens")
        out[int(key)] = check_number(f"{name} at {key}", number, -1e30, 1e30)
    return out


def _check_density(plan: Plan, written: Mapping[int, float]) -> None:
    if plan.n_max not in written:
        raise UserError(f"density has no entry for n_max = {plan.n_max}: remake the plan, or add it")
    for n, value in written.items():
        if n > plan.n_max:
            raise UserError(f"density has the length {n}: must be at most n_max = {plan.n_max}")
        real = plan.density(n)
        if abs(real - value) > DENSITY_TOLERANCE:
            raise UserError(f"density at {n} is {value:g}: the rules give {real:.6f}; correct it, or make the plan again")
