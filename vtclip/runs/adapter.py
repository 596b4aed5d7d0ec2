# SPDX-License-Identifier: Apache-2.0
"""An adapted head on disk: `adapter.safetensors` (tensors) and `adapter_config.json` (the rest).

The config names the digest of the tensors and carries a digest of itself, so a cut or changed byte
in either file is found on loading. Nothing is pickled and loading runs no code of the file's.

Saving replaces both in one step, with the other files of a run where there are any (`NewFiles`).
A result beside them names the digest of the tensors, and loading refuses an adapter that is
another run's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as save_bytes

from vtclip import __version__, files
from vtclip.clip.identity import differences
from vtclip.extensions.registry import missing_line
from vtclip.files import Json
from vtclip.heads import HEADS, Head, RAda, method_from
from vtclip.runs.result import RESULT
from vtclip.schemas import (
    anything,
    by_name,
    check,
    maybe,
    number,
    obj,
    one_of,
    rows,
    table,
    text,
    tuple_of,
    whole,
    yes_or_no,
)
from vtclip.train.conformal import Calibration
from vtclip.train.transduction import Weights

if TYPE_CHECKING:
    from torch import Tensor

    from vtclip.clip import Clip
    from vtclip.data.records import Records

FORMAT_VERSION = 1
MOST_OPTION = 2**16  # what a whole number among the options may be, or the size of a saved tensor
TENSORS, CONFIG = "adapter.safetensors", "adapter_config.json"
WHAT = "a vtclip adapter"
_positive = number(0, above=True)
_encoders = {"file": one_of("encoders.safetensors", "lora.safetensors"), "digest": text}
# keys with a "?" came after the first version, or are there where they mean something
SCHEMA = table(
    {
        "format_version": whole(1),
        "vtclip_version?": text,
        "method": text,
        "options": obj,
        "class_names": rows(text, least=1),
        "temperature": maybe(_positive),
        "features": table(
            {
                "model?": maybe(text),
                "model_config?": maybe(obj),
                "weights_digest?": maybe(text),
                "spatial?": maybe(text),
                "templates?": anything,
                "texts?": maybe(text),
                "width?": whole(1),
                "spatial_width?": maybe(whole(1)),
                "logit_scale?": number(),
                "source?": maybe(text),
                "encoders?": table({**_encoders, "base_weights": text, "scale?": number()}),
                "multi_label?": table(
                    {"scale": number(), "offset": rows(number()), "threshold": number(0, 1)}
                ),
            }
        ),
        "calibration?": maybe(obj),
        "tensors": by_name(tuple_of(text, rows(whole()))),
        "tensors_digest": text,
        "final?": yes_or_no,
        "method_from?": maybe(by_name(maybe(text))),
        "together?": maybe(by_name(number())),
    }
)


@dataclass(frozen=True)
class Adapter:
    """A head (its class texts [K, C] are its buffer `text`) and what it was made for.

    `features` says which image and spatial features it takes: model (as given to load_clip, with
    an absolute path), model_config (architecture, preprocessing, tokenizer), weights_digest,
    spatial option, templates or prompt, digest of the class texts, logit scale. model is None where
    it was fitted on a table of features that names no image encoder. `calibration` holds the scores
    of its validation images, None where it had none. `final`: the head was fitted to all images of
    its run after the evaluation, the test's too. `together`: the share and temperature of what is
    decided together (vtclip.runs.together), where validation images said them.
    """

    head: Head
    class_names: list[str]
    temperature: float | None
    features: Json
    calibration: Calibration | None = None
    final: bool = False
    together: Weights | None = None


def save_adapter(folder: Path, adapter: Adapter) -> str:
    """Write the adapter's two files into `folder`; returns the digest of the tensors."""
    with files.NewFiles(folder) as new:
        digest = add_adapter(new, adapter)
        new.commit()
    return digest


def add_adapter(new: files.NewFiles, adapter: Adapter) -> str:
    """The adapter's two files among others of a run; returns the digest of the tensors."""
    head = adapter.head
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    for name, value in tensors.items():
        if value.layout != torch.strided or not bool(value.isfinite().all()):
            raise ValueError(f"save_adapter: tensor {name} must be dense and finite")
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    digest = files.tensors_digest(tensors)
    config: Json = {
        "format_version": FORMAT_VERSION,
        "vtclip_version": __version__,
        "method": head.method,
        "options": head.options(),
        "class_names": adapter.class_names,
        "temperature": adapter.temperature,
        "features": adapter.features,
        "calibration": None if adapter.calibration is None else adapter.calibration.to_json(),
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())},
        "tensors_digest": digest,
    }
    if adapter.final:
        config["final"] = True
    if adapter.together is not None:
        config["together"] = adapter.together._asdict()
    if (origin := method_from(head.method)) is not None:
        config["method_from"] = origin
    config["config_digest"] = files.json_digest(config)
    # one entry of metadata: safetensors writes several in random order, and runs are compared
    new.write(TENSORS, save_bytes(tensors, {"digest": digest}))
    new.write(CONFIG, files.to_json(config))
    return digest


def read_config(folder: Path, digest: str) -> Json:
    """The checked config that belongs to tensors of this digest."""
    config = _checked_config(folder / CONFIG)
    if config["tensors_digest"] != digest:
        wanted = str(config["tensors_digest"])[:12]
        raise ValueError(
            f"not {WHAT}: {folder / TENSORS} has digest {digest[:12]}, {CONFIG} wants {wanted}"
        )
    return config


def _checked_config(path: Path) -> Json:
    config = files.read_json(path, WHAT)
    version = config.get("format_version")
    if not isinstance(version, int):
        raise ValueError(f"not {WHAT}: {path} names no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version} (written by vtclip "
            f"{config.get('vtclip_version')}), this vtclip {__version__} reads up "
            f"to {FORMAT_VERSION}"
        )
    named = config.pop("config_digest", None)
    try:
        same = named == files.json_digest(config)
    except ValueError as error:
        raise ValueError(f"not {WHAT}: {path}: {error}") from None
    if not same:
        raise ValueError(
            f"not {WHAT}: {path} was changed after it was written (its digest differs)"
        )
    check(config, SCHEMA, f"not {WHAT}: {path}")
    return config


def load_adapter(
    folder: str | Path, *, device: str | torch.device = "cpu", result: Json | None = None
) -> Adapter:
    """The adapter in `folder`; a missing, cut, changed or mismatching part is one clear error.

    result: of the run that it must belong to; None takes that in the folder, if there is one.
    """
    folder = Path(folder).expanduser()
    return files.read_settled(folder, lambda: _load(folder, device, result))


def _load(folder: Path, device: str | torch.device, result: Json | None) -> Adapter:
    if not folder.is_dir():
        raise FileNotFoundError(f"not {WHAT}: {folder} is not a folder")
    if not (folder / CONFIG).exists() and not (folder / TENSORS).exists():
        raise FileNotFoundError(f"not {WHAT}: {folder} holds neither {TENSORS} nor {CONFIG}")
    tensors, metadata = files.read_safetensors(folder / TENSORS, WHAT)
    config = read_config(folder, metadata["digest"])
    _check_result(folder, metadata["digest"], result)
    method, class_names = config["method"], config["class_names"]
    if method not in HEADS:
        if config.get("method_from"):
            raise ValueError(f"{folder}: {missing_line('method', method, config['method_from'])}")
        raise ValueError(f"{folder}: unknown method {method!r}, this vtclip has {', '.join(HEADS)}")
    kind = HEADS[method]  # which says what is wrong with a package that cannot be imported
    _same_names(folder, "tensors", list(config["tensors"]), list(tensors))
    head = _head_of(folder, kind, config, tensors)
    state = {name.removeprefix("head."): value for name, value in tensors.items()}
    for prefix, module in head.named_modules():  # names of an older version
        if isinstance(module, RAda):
            state = module.packed(state, f"{prefix}." if prefix else "")
    wanted = head.state_dict()
    _same_names(folder, f"weights of method {method!r}", list(wanted), list(state))
    for name, value in wanted.items():
        saved = state[name]
        if (saved.dtype, saved.shape) != (value.dtype, value.shape):
            raise ValueError(
                f"{folder}: weight {name} must be {value.dtype} {list(value.shape)}, "
                f"got {saved.dtype} {list(saved.shape)}"
            )
    head.load_state_dict(state)
    head.to(device).eval()
    calibration = config.get("calibration")  # older runs have none
    together = config.get("together")
    try:
        return Adapter(
            head,
            class_names,
            config["temperature"],
            config["features"],
            None if calibration is None else Calibration.from_json(calibration),
            bool(config.get("final")),
            None if together is None else Weights(**together),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"not {WHAT}: {folder / CONFIG}: {one_line(error)}") from None


def _head_of(folder: Path, kind: type[Head], config: Json, tensors: dict[str, Tensor]) -> Head:
    """The head that the config's method and options make, with other weights than the saved."""
    method, class_names = config["method"], config["class_names"]
    text = tensors.get("head.text")
    if text is None or text.dim() != 2:
        raise ValueError(
            f"not {WHAT}: {folder / TENSORS} must hold class texts [K, C] as head.text"
        )
    if len(text) != len(class_names):
        raise ValueError(f"{folder}: {len(class_names)} class names but {len(text)} class texts")
    options = config["options"]
    # a width beyond all saved tensors cannot fit them, and making room for it may take all memory
    largest = max(MOST_OPTION, *(tensor.numel() for tensor in tensors.values()))
    for name, value in _whole_numbers(options):
        if abs(value) > largest:
            raise ValueError(
                f"{folder}: option {name} of method {method!r} must be at most {largest}"
            )
    try:
        return kind(text, **options)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, AttributeError,
            MemoryError) as error:  # fmt: skip
        raise ValueError(
            f"{folder}: options do not fit method {method!r}: {one_line(error)}"
        ) from None


def _whole_numbers(options: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Every whole number among the options, those of the members of method auto too."""
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _whole_numbers(item)
            elif isinstance(item, int):
                yield name, item


def one_line(error: Exception) -> str:
    """The reason of an error that another room raised, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _check_result(folder: Path, digest: str, result: Json | None) -> None:
    """Refuse an adapter that is not the one of which a result in the folder tells."""
    if result is None:
        try:
            result = files.read_json(folder / RESULT, "a vtclip run")
        except (OSError, ValueError):  # an adapter alone; whoever needs the result says what it is
            return
    digests = result.get("digests")
    named = digests.get("adapter") if isinstance(digests, dict) else None
    if isinstance(named, str) and named != digest:
        raise ValueError(
            f"{folder / TENSORS} (digest {digest[:12]}) and {RESULT} (of adapter {named[:12]}) "
            "belong to different runs; fit again"
        )


def _same_names(folder: Path, what: str, wanted: list[str], actual: list[str]) -> None:
    missing, extra = sorted(set(wanted) - set(actual)), sorted(set(actual) - set(wanted))
    if missing or extra:
        shown = [f"missing {name}" for name in missing[:3]]
        shown += [f"extra {name}" for name in extra[:3]]
        raise ValueError(f"{folder}: {what} do not match: {', '.join(shown)}")


def features_of(records: Records, model: str) -> Json:
    """What an adapter must know of its features: where they come from and what they look like.

    model: the name that was given, where the features do not name the model they were asked of.
    """
    info = records.info
    return {
        "model": info.get("model_name", model) if info.get("model") else None,
        "model_config": info.get("model"),
        "weights_digest": info.get("digests", {}).get("weights"),
        "spatial": info.get("spatial"),
        "templates": info.get("templates"),
        "texts": info.get("digests", {}).get("text"),
        "width": records.width,
        "spatial_width": records.spatial_width,
        "logit_scale": records.logit_scale,
        "source": info.get("kind"),
    }


def check_same_model(
    wanted: Json, weights: str | None, config: Json | None, what: str, other: str
) -> None:
    """Refuse an encoder that is not the run's in every field that changes a feature.

    wanted: `Adapter.features`; a field that it lacks, as older ones may, is not checked.
    weights, config: `Clip.weights_digest` and `Clip.config` of the other encoder.
    what: how the error begins; other: whose are the other values.
    """
    found = []
    if "weights_digest" in wanted and weights != wanted["weights_digest"]:
        run, have = (_short(digest) for digest in (wanted["weights_digest"], weights))
        found.append(f"weights {run} vs {have}")
    known = wanted.get("model_config")
    if known and config:
        found += differences(known, config)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{what}; of the run vs of {other}: {'; '.join(found[:3])}{more}")


def check_model(adapter: Adapter, clip: Clip, *, given: bool = True) -> None:
    """Refuse an image encoder other than the one the adapter was fitted on.

    given: whether the caller named the model; if not, the run's own record did.
    """
    other = "--model" if given else "the one at that place"
    what = f"model {clip.name!r} is not the model of the run"
    check_same_model(adapter.features, clip.weights_digest, clip.config, what, other)


def check_features(adapter: Adapter, records: Records) -> None:
    """Refuse features of another kind than the adapter was fitted on, naming what differs."""
    actual = features_of(records, adapter.features.get("model") or "unused")
    if records.targets is not None and "multi_label" not in adapter.features:
        raise ValueError("the source has several labels per image, the run was fitted on one")
    check_same_model(
        adapter.features,
        actual["weights_digest"],
        actual["model_config"],
        "the source was not made by the model of the run",
        "the source",
    )
    names = ["width", *(("spatial", "spatial_width") if adapter.head.needs_spatial else ())]
    for name in names:
        if adapter.features.get(name) != actual[name]:
            raise ValueError(
                f"the source has {name} {actual[name]}, the adapter was fitted on "
                f"{adapter.features.get(name)}"
            )


def _short(digest: object) -> str:
    return "none" if digest is None else str(digest)[:12]
