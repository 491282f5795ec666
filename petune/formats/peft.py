"""PEFT's folder format, both ways. What a method has in common with one of PEFT's is stated as data: a `PeftTwin`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petune.core.attached.attach import attach
from petune.core.attached.folder import read_tensors
from petune.core.attached.load import fill
from petune.core.frozen.modules import walk
from petune.core.frozen.site import Site
from petune.core.frozen.where import select
from petune.core.method.arguments import arguments
from petune.core.method.twin import PeftTwin
from petune.core.registry.methods import methods, resolve
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError, UnsupportedError
from petune.files import read_json
from petune.formats.layouts import SHAPES, WHOLES, Place, Plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning
    from petune.core.forward.link import Link

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def export(
    tuning: Tuning, *, parts: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) as PEFT would have written them.

    Args:
        parts: let parts of a fused projection pass, under the names of their sites.

    Raises:
        UnsupportedError: PEFT has no such method, or no such place to put it.
    """
    if not parts and tuning.weight != 1:
        raise UnsupportedError(
            f"PEFT's format has no place for a weight of {tuning.weight}; save without format=."
        )
    twin = _twin(tuning)
    own = [link for link in tuning.links if link.site.kind != "module"]
    if not parts and any(link.site.part is not None for link in own):
        what = f"{tuning.method!r} acts on parts of a fused projection here, which PEFT can't"
        raise UnsupportedError(
            f'{what}; format="serving" can write some for the whole.'
        )
    plain = {link.site.name: dict(link.adapter.plain()) for link in own}
    config: dict[str, Any] = {
        "peft_type": twin.kind,
        "task_type": _task(tuning.model),
        "inference_mode": True,
    }
    config["base_model_name_or_path"] = getattr(
        tuning.model.config, "name_or_path", None
    )
    config |= {key: allowed[0] for key, allowed in twin.neutral.items()} | dict(
        twin.training
    )
    config |= _arguments(tuning, twin)
    for theirs, name in twin.arguments.items() if twin.same else []:
        odd = next(
            (
                k
                for k in own
                if name in twin.same and getattr(k.adapter, name) != config[theirs]
            ),
            None,
        )
        if odd is not None:
            what = f"{odd.site.name} has {name}={getattr(odd.adapter, name)!r}, not {config[theirs]!r}"
            raise UnsupportedError(
                f"{what}, and PEFT has one for all; attach with a {name} that fits all."
            )
    config |= _scales(tuning, own, plain, twin, config)
    config["modules_to_save"] = list(tuning.heads) or None
    prefix = PREFIX.removesuffix("model.") if twin.whole else PREFIX
    heads = {
        link.site.name: link.adapter.state_dict()
        for link in tuning.links
        if link.site.kind == "module"
    }
    tensors = {
        f"{prefix}{n}.{k.removeprefix('module.')}": t
        for n, state in heads.items()
        for k, t in state.items()
    }
    if twin.whole:
        tensors["prompt_embeddings"] = WHOLES[twin.whole].write(
            tuning.model, plain, [link.site for link in own]
        )
    else:
        listed = {
            link.site.name for link in own if link.site.role in _roles(tuning, twin)
        }
        config |= dict.fromkeys(twin.roles, short_names(tuning.model, listed))
        found = _renamed(tuning, own, plain, twin, listed)
        tensors |= {
            f"{PREFIX}{module}.{theirs}": t for (module, theirs), t in found.items()
        }
        config["target_modules"] = short_names(
            tuning.model, {module for module, _ in found}
        )
    return {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, config


def _renamed(
    tuning: Tuning, own: list[Link], plain: Plain, twin: PeftTwin, listed: set[str]
) -> dict[tuple[str, str], Tensor]:
    """The tensors by PEFT's names, each once: (module, name inside it)."""
    found, seen = {}, set()
    for link in own:
        site = link.site
        place = Place(site, site.name in listed, plain[site.name])
        module = (
            _input_embedding(tuning.model) if site.kind == "embedding" else site.name
        )
        for key, tensor in plain[site.name].items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensor = tensor.detach().cpu()
                layout = twin.layouts.get(key)
                theirs = twin.tensors[key] if twin.tensors is not None else key
                found[module, theirs] = (
                    SHAPES[layout].write(tensor, place) if layout else tensor
                )
    return found


def load(model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    """Attach what PEFT has saved.

    Raises:
        PetuneError: no method here is that of the folder, or it does not fit the model; the model stays as it was.
    """
    config = read_json(folder / CONFIG)
    method, twin = _method(config, folder)
    saved = {_plain_key(k): v for k, v in read_tensors(folder / WEIGHTS).items()}
    drawn = {ours: saved.pop(theirs, None) for ours, theirs in twin.drawn.items()}
    site = {s.name: s for s in find_sites(model)}
    modules = _modules(model, saved, site, twin)
    heads = _heads(saved.keys() - modules.keys(), config.get("modules_to_save") or ())
    names = dict.fromkeys(module for module, _ in modules.values())
    if strange := sorted(names.keys() - site.keys()):
        raise UnsupportedError(
            f"{folder}: it adapts {strange[0]}, where petune has no hook point."
        )
    given = {
        our: config[theirs]
        for theirs, our in twin.arguments.items()
        if config.get(theirs) is not None
    }
    for theirs, our in twin.roles.items():
        given[our] = " ".join(
            sorted(
                {site[n].role for n in names if _listed(n, config.get(theirs) or ())}
            )
        )
    if twin.ranked:
        patterns = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
        given |= {
            f"{twin.arguments[k]}_pattern": _by_site(config.get(p), names)
            for k, p in patterns.items()
        }
    tuning = attach(
        model,
        method,
        name=name,
        where=_where(model, site, list(names)),
        train=heads,
        **given,
    )
    try:
        sites = [link.site for link in tuning.links if link.site.kind != "module"]
        _check_drawn(tuning, drawn, folder)
        found: dict[str, Tensor] = {}
        if twin.whole:
            found |= WHOLES[twin.whole].read(
                model, saved.pop("prompt_embeddings"), sites
            )
        else:
            found |= _uncut(tuning, _read(tuning, saved, modules, twin), twin)
        for key in sorted(saved.keys() - modules.keys()):
            if key.startswith(tuple(h + "." for h in heads)):
                found[".module.".join(key.rsplit(".", 1))] = saved[key]
            elif not _is_base(model, key, saved[key]):
                raise UnsupportedError(
                    f"{folder}: {key} is nothing that {method!r} has."
                )
        fill(tuning, found, folder)
    except PetuneError:
        tuning.detach()
        raise
    except (
        LookupError,
        RuntimeError,
        ValueError,
    ) as bad:  # tensors of another shape than their layout's
        tuning.detach()
        raise PetuneError(f"{folder} does not fit this model: {bad}.") from bad
    return tuning


def _read(
    tuning: Tuning,
    saved: Mapping[str, Tensor],
    modules: Mapping[str, tuple[str, str]],
    twin: PeftTwin,
) -> dict[str, Tensor]:
    """The tensors by our names."""
    order, listed = list(twin.tensors or ()), _roles(tuning, twin)
    sites = {link.site.name: link.site for link in tuning.links}
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(
        modules, key=lambda k: order.index(modules[k][1]) if order else 0
    ):
        module, ours = modules[key]
        here, layout = found.setdefault(module, {}), twin.layouts.get(ours)
        if layout and module in sites:
            here[ours] = SHAPES[layout].read(
                saved[key], Place(sites[module], sites[module].role in listed, here)
            )
        else:
            here[ours] = saved[key]
    saved_as = {
        id(tensor): key for key, tensor in tuning.state()
    }  # PEFT names what modules share after each of them
    own = {
        f"{link.site.name}.{name}": saved_as[id(tensor)]
        for link in tuning.links
        if link.site.kind != "module"
        for name, tensor in link.adapter.plain().items()
    }
    flat = {
        f"{module}.{ours}": t
        for module, here in found.items()
        for ours, t in here.items()
    }
    return {own.get(key, key): tensor for key, tensor in flat.items()}


def _uncut(
    tuning: Tuning, found: dict[str, Tensor], twin: PeftTwin
) -> dict[str, Tensor]:
    """The tensors with zeros for the ranks that PEFT has left out."""
    for link in tuning.links if twin.cut else []:
        own = link.adapter.plain()
        for name, axis in twin.cut.items():
            key = f"{link.site.name}.{name}"
            if (
                key in found
                and (gone := own[name].shape[axis] - found[key].shape[axis]) > 0
            ):
                shape = [
                    gone if i == axis else size
                    for i, size in enumerate(found[key].shape)
                ]
                found[key] = torch.cat([found[key], found[key].new_zeros(shape)], axis)
    return found


def _modules(
    model: PreTrainedModel,
    saved: Iterable[str],
    sites: Mapping[str, Site],
    twin: PeftTwin,
) -> dict[str, tuple[str, str]]:
    """(module, our tensor) of each key that is the method's."""
    found: dict[str, tuple[str, str]] = {}
    table, embed = (
        _input_embedding(model),
        [s.name for s in sites.values() if s.kind == "embedding"],
    )
    linear = [name for name, site in sites.items() if site.kind == "linear"]
    for key in saved:
        for ours, theirs in (twin.tensors or {}).items():
            if key.endswith("." + theirs):
                module = key.removesuffix("." + theirs)
                found[key] = (embed[0] if embed and module == table else module), ours
        for name in linear if twin.tensors is None else []:
            if key.startswith(name + "."):
                found[key] = name, key.removeprefix(name + ".")
    return found


def _heads(keys: Iterable[str], ends: Iterable[str]) -> list[str]:
    """The modules that PEFT has saved whole: it takes all whose names end so, and lists heads that might be there."""
    found = set()
    for key in keys:
        parts = key.split(".")
        paths = (".".join(parts[:i]) for i in range(1, len(parts)))
        found.add(next((path for path in paths if path.endswith(tuple(ends))), ""))
    return sorted(found - {""})


def _where(
    model: PreTrainedModel, sites: dict[str, Site], names: list[str]
) -> str | None:
    """What picks these sites: short names where they do. Embeddings and prompts have none that `where` knows."""
    if not names or any(sites[n].kind not in ("linear", "block") for n in names):
        return None
    short = " ".join(short_names(model, set(names)))
    same = {s.name for s in select(list(sites.values()), short)} == set(names)
    return short if same else " ".join(names)


def _plain_key(key: str) -> str:
    return (
        key.removeprefix(PREFIX)
        if key.startswith(PREFIX)
        else key.removeprefix("base_model.")
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.cpu().float(), other.cpu().float(), rtol=1e-5, atol=1e-6
    )


def _is_base(model: PreTrainedModel, key: str, tensor: Tensor) -> bool:
    """A copy of the base's own weight, which PEFT adds where a head or an embedding is adapted."""
    own = dict(model.named_parameters()).get(key.replace(".base_layer.", "."))
    return own is not None and _same(own, tensor)


def _check_drawn(
    tuning: Tuning, drawn: Mapping[str, Tensor | None], folder: Path
) -> None:
    for ours, theirs in drawn.items():
        for link in tuning.links if theirs is not None else []:
            mine = getattr(link.adapter, ours, None)  # a head has none
            if (
                mine is not None
                and theirs is not None
                and not _same(theirs[: len(mine), : mine.shape[1]], mine)
            ):
                raise UnsupportedError(
                    f"{folder}: its {ours} is not the one that its seed draws here."
                )


def _scales(
    tuning: Tuning,
    own: list[Link],
    plain: Plain,
    twin: PeftTwin,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """PEFT's rank and alpha, and the exceptions by module, of a method whose sites may differ in them."""
    if not twin.ranked:
        return {}
    rank = {name: len(tensors[twin.ranked]) for name, tensors in plain.items()}
    root = math.sqrt if config.get("use_rslora") else float
    scale: dict[str, Any] = {link.site.name: link.adapter.scale for link in own}
    exact = {name: round(scale[name] * root(r), 6) for name, r in rank.items()}
    alpha = {
        name: int(value) if value.is_integer() else value
        for name, value in exact.items()
    }
    found: dict[str, Any] = {}
    for key, pattern, values in (
        ("r", "rank_pattern", rank),
        ("lora_alpha", "alpha_pattern", alpha),
    ):
        most = Counter(values.values()).most_common(1)[0][0]
        found |= {
            key: most,
            pattern: {name: value for name, value in values.items() if value != most},
        }
    return found


def _listed(name: str, ends: str | Sequence[str]) -> bool:
    """PEFT lists modules by the ends of their names, or by one regular expression."""
    return (
        bool(re.fullmatch(ends, name))
        if isinstance(ends, str)
        else f".{name}".endswith(tuple(ends))
    )


def _by_site(
    pattern: Mapping[str, Any] | None, names: Iterable[str]
) -> dict[str, Any] | None:
    """PEFT's exceptions, which are ends of names or regular expressions, by the names that they mean."""
    hits = {
        n: next(
            (v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", n)),
            None,
        )
        for n in names
    }
    return {name: value for name, value in hits.items() if value is not None} or None


def _roles(tuning: Tuning, twin: PeftTwin) -> set[str]:
    """The roles that the arguments in `twin.roles` list."""
    known = arguments(resolve(tuning.method)[1])
    return {
        r
        for our in twin.roles.values()
        for r in tuning.arguments.get(our, known[our].default).split()
    }


def _arguments(tuning: Tuning, twin: PeftTwin) -> dict[str, Any]:
    defaults = {
        key: p.default for key, p in arguments(resolve(tuning.method)[1]).items()
    }
    said = {*twin.arguments.values(), *twin.roles.values(), *twin.unsaid}
    if twin.ranked:
        said |= {f"{twin.arguments[key]}_pattern" for key in ("r", "lora_alpha")}
    for key, value in tuning.arguments.items():
        if key not in said and value != defaults[key]:
            raise UnsupportedError(
                f"{tuning.method!r} with {key}={value!r} has no place in PEFT's format; merge it."
            )
    found = {
        theirs: tuning.arguments.get(ours, defaults[ours])
        for theirs, ours in twin.arguments.items()
    }
    for theirs, value in found.items():
        if value not in twin.neutral.get(theirs, (value,)):
            what = f"{tuning.method!r} with {twin.arguments[theirs]}={value!r}"
            raise UnsupportedError(
                f"{what} is another method in PEFT; save in petune's own, or merge it."
            )
    return found


def _twin(tuning: Tuning) -> PeftTwin:
    if len(tuning.parts) > 1:
        raise UnsupportedError(
            "PEFT's format has no place for a tuning of several methods; save without format=."
        )
    twin = vars(resolve(tuning.method)[1]).get(
        "peft"
    )  # its own: a subclass is another method
    if not isinstance(twin, PeftTwin):
        raise UnsupportedError(
            f"PEFT's format has no {tuning.method!r}; save in petune's own, or merge it."
        )
    return twin


def _method(config: Mapping[str, Any], folder: Path) -> tuple[str, PeftTwin]:
    kind = config.get("peft_type")
    found = {name: vars(cls).get("peft") for name, cls in methods().items()}
    known = {
        name: twin
        for name, twin in found.items()
        if isinstance(twin, PeftTwin) and twin.tensors != {}
    }
    twins = {
        name: twin for name, twin in known.items() if kind in (twin.kind, *twin.also)
    }
    renamed = {name: twin for name, twin in twins.items() if twin.tensors is not None}
    refused = ""
    for name, twin in (
        renamed or twins
    ).items():  # our own method of that kind, if there is one, or PEFT's in ours
        other = next(
            (
                k
                for k, allowed in twin.neutral.items()
                if config.get(k, allowed[0]) not in allowed
            ),
            None,
        )
        if other is None:
            return name, twin
        refused = refused or f" with {other}={config[other]!r}"
    if refused:
        raise UnsupportedError(
            f"{folder / CONFIG}: no method here is PEFT's {kind}{refused}."
        )
    have = ", ".join(
        sorted({kind for twin in known.values() for kind in (twin.kind, *twin.also)})
    )
    raise UnsupportedError(
        f"{folder / CONFIG}: no method here is PEFT's {kind}. Known: {have}."
    )


def _task(model: PreTrainedModel) -> str | None:
    cls = getattr(type(model), "petune_base", type(model)).__name__
    return next((task for end, task in TASKS.items() if cls.endswith(end)), None)


def _input_embedding(model: PreTrainedModel) -> str:
    """The name of the table that PEFT takes as the input embedding."""
    table = model.get_input_embeddings()
    return next(name for name, module in walk(model) if module is table)


def short_names(model: PreTrainedModel, names: set[str]) -> list[str]:
    """The last parts of the names where they mean the same modules, as serving engines expect; else whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in walk(model) if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == names else names)
