# SPDX-License-Identifier: Apache-2.0
"""Methods and data sets of others: registered in the process, or entry points of a package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tables
import torch

import vtclip
from vtclip.data.sets import SETS, Spec, find_set
from vtclip.extensions import registry
from vtclip.heads import HEADS, FitConfig, Head, ImageHead

ROOT = Path(__file__).parents[2]
PLUGIN = '''
from pathlib import Path
from vtclip.data.sets import Spec
from vtclip.heads import ImageHead
from vtclip.ops import cosine_logits

class Blend(ImageHead):
    """Nothing but zero-shot."""

    def image_logits(self, image):
        return cosine_logits(image, self.text, scale=self.logit_scale)

def read(spec, root):
    raise spec.error("read was called")

LEAVES = Spec("leaves", "Leaves", "leaf_folder", "", "a {} leaf.", 2, (4, None, 2), ("a.txt",),
              read, "its owner", "its owner")
'''
POINTS = """[vtclip.methods]
blend = plug.heads:Blend
broken = plug.nowhere:Blend
proker = plug.heads:Blend
wrong = plug.heads:read

[vtclip.data_sets]
leaves = plug.heads:LEAVES
torn = plug.nowhere:LEAVES
"""


class Plain(ImageHead):
    def image_logits(self, image: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * image @ self.text.mT


def own_class() -> type[ImageHead]:
    """A class that has not been registered yet."""
    return type("Own", (Plain,), {"__module__": __name__})


@pytest.fixture
def clean() -> Iterator[None]:
    """Takes back what the test registered."""
    before = {group: set(names) for group, names in registry._registered.items()}
    yield
    for table in (HEADS, SETS):
        for name in set(registry._registered[table.group]) - before[table.group]:
            table.remove(name)


def make_plugin(site: Path) -> Path:
    """An installed distribution: its module, its metadata and its entry points."""
    info = site / "vt_plug-1.5.dist-info"
    (site / "plug").mkdir(parents=True)
    info.mkdir()
    (site / "plug" / "__init__.py").write_text("")
    (site / "plug" / "heads.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vt-plug\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(POINTS)
    (info / "RECORD").write_text("plug/__init__.py,,\nplug/heads.py,,\n")
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plugin(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "animals.npz"
    features = tables.animal_features()
    np.savez(path, **{name: features[name] for name in features if name != "spatial"})
    return path


def child(*words: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these words, beside the distribution in `site` where there is one."""
    path = [str(ROOT), *([] if site is None else [str(site)]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_of_plugin(tmp_path_factory: pytest.TempPathFactory, site: Path, table: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    done = child("-m", "vtclip", "fit", str(table), "--method", "blend", "--out", str(out),
                 site=site)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_a_registered_method_is_a_method_like_the_others(clean, table, tmp_path):
    kind = own_class()
    vtclip.register_method("own", kind)
    assert HEADS["own"] is kind
    assert kind.method == "own"
    assert list(HEADS)[-1] == "own"
    run = vtclip.fit(table, method="own", out=tmp_path / "run")
    assert run.accuracy == run.result["zero_shot"]["accuracy"]
    assert vtclip.evaluate(run.folder)["accuracy"] == run.accuracy
    with pytest.raises(ValueError, match="unknown method 'owm'; did you mean 'own'?"):
        vtclip.fit(table, method="owm")


def test_a_recipe_trains_the_head(clean, table, tmp_path):
    class Shift(Plain):
        def __init__(self, text: torch.Tensor, *, logit_scale: float = 100.0) -> None:
            super().__init__(text, logit_scale=logit_scale)
            self.shift = torch.nn.Parameter(torch.zeros_like(self.text))

        def image_logits(self, image: torch.Tensor) -> torch.Tensor:
            return self.logit_scale * image @ (self.text + self.shift).mT

    vtclip.register_method("shift", Shift, lambda shots: FitConfig(epochs=shots, lr=1e-2))
    run = vtclip.fit(table, method="shift", shots=8, refit=False, out=tmp_path / "run")
    assert run.result["config"]["fit"]["epochs"] == 8
    assert run.accuracy > run.result["zero_shot"]["accuracy"]


class NoForward(Head):
    pass


class NoLogits(ImageHead):
    pass


class NoScale(Plain):
    def __init__(self, text: torch.Tensor) -> None:
        super().__init__(text)


class NoDefault(Plain):
    def __init__(self, text: torch.Tensor, *, share: float, logit_scale: float = 1.0) -> None:
        super().__init__(text, logit_scale=logit_scale)


class NoAttribute(Plain):
    def __init__(self, text: torch.Tensor, *, share: float = 1, logit_scale: float = 1.0) -> None:
        super().__init__(text, logit_scale=logit_scale)


class Named(Plain):
    method = "other"


class Breaks(Plain):
    def __init__(self, text: torch.Tensor, *, logit_scale: float = 1.0) -> None:
        super().__init__(text, logit_scale=logit_scale)
        raise RuntimeError("not\ntoday")


class Trains(Plain):
    @classmethod
    def recipe(cls, shots: int) -> FitConfig:
        return FitConfig(epochs=1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (dict, "must be a subclass of vtclip.heads.Head, got dict"),
        (3, "must be a subclass of vtclip.heads.Head, got int"),
        (NoForward, "NoForward lacks forward"),
        (NoLogits, r"NoLogits lacks image_logits\(image\)"),
        (NoScale, "NoScale.__init__ lacks the option logit_scale"),
        (NoDefault, "NoDefault.__init__: option share lacks a default"),
        (NoAttribute, "NoAttribute lacks the attribute share"),
        (Named, "Named.method must be 'mine', got 'other'"),
        (Breaks, r"Breaks cannot be made .*: RuntimeError: not today"),
        (Trains, "Trains lacks parameters to train"),
    ],
)
def test_a_class_that_lacks_something_is_refused_in_one_line(clean, kind, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        vtclip.register_method("mine", kind)
    assert "\n" not in str(caught.value)
    assert "mine" not in HEADS


def test_a_taken_or_unfit_name_is_refused(clean):
    for name in ("proker", "auto"):
        with pytest.raises(ValueError, match=f"method '{name}' is there already$"):
            vtclip.register_method(name, own_class())
    for name in ("a b", "", "all", "x,y", "-x", "../x"):
        with pytest.raises(ValueError, match="name must be letters"):
            vtclip.register_method(name, own_class())
    vtclip.register_method("mine", own_class())
    with pytest.raises(ValueError, match="'mine' is there already, registered before; replace"):
        vtclip.register_method("mine", own_class())
    second = own_class()
    vtclip.register_method("mine", second, replace=True)
    assert HEADS["mine"] is second
    with pytest.raises(ValueError, match="'proker' is there already"):
        vtclip.register_method("proker", own_class(), replace=True)


def test_a_refused_class_keeps_its_own_recipe(clean):
    kind = own_class()
    with pytest.raises(ValueError, match="there already"):
        vtclip.register_method("proker", kind, lambda shots: FitConfig(epochs=3))
    assert kind.recipe(4).epochs == 0
    assert "recipe" not in vars(kind)


def test_an_entry_point_is_imported_when_its_name_is_asked_for(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    assert {"blend", "broken", "wrong"} <= set(registry.names_beside(registry.METHODS))
    assert "zeroshot" in HEADS
    assert HEADS["proker"].__module__ == "vtclip.heads.proker"  # no other takes a built-in's place
    assert "plug" not in sys.modules
    assert HEADS["blend"].method == "blend"
    assert find_set("leaves").title == "Leaves"
    assert find_set("Leaf Folder") is SETS["leaves"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "plug"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_broken_plugin_names_its_distribution_and_harms_no_other(site, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(site))
    for name, fault in ("broken", "ModuleNotFoundError"), ("wrong", "subclass of vtclip"):
        with pytest.raises(ValueError, match=f"method '{name}' of vt-plug 1.5 cannot be") as caught:
            HEADS[name]
        assert fault in str(caught.value)
        assert "\n" not in str(caught.value)
    listed = set(HEADS)
    assert {"blend", "proker"} <= listed
    assert not {"broken", "wrong"} & listed
    names = set(SETS)
    assert "leaves" in names
    assert "torn" not in names
    assert "data set 'torn' of vt-plug 1.5 cannot be used: ModuleNotFoundError" in caplog.text


def test_the_command_line_knows_installed_names(site, table):
    helped = child("-m", "vtclip", "fit", "--help", site=site)
    assert "methods of other packages: blend, broken" in helped.stdout
    assert "methods of other packages" not in child("-m", "vtclip", "fit", "--help").stdout
    near = child("-m", "vtclip", "fit", str(table), "--method", "blende", site=site)
    assert near.returncode == 2
    assert "did you mean 'blend'?" in near.stderr
    bad = child("-m", "vtclip", "fit", str(table), "--method", "broken", site=site)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "'broken' of vt-plug 1.5 cannot be used" in bad.stderr


def test_bench_takes_an_installed_method(site, table, tmp_path):
    words = ["bench", str(table), "--methods", "zeroshot,blend", "--shots", "1", "--seeds", "1"]
    done = child("-m", "vtclip", *words, "--out", str(tmp_path / "out"), site=site)
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| blend " in shown
    told = child("-m", "vtclip", "report", str(tmp_path / "out"), "--method", "blend")
    assert told.returncode == 0, told.stderr  # a report needs no method, only its rows


def test_a_run_says_where_its_method_is_from_and_what_is_missing(run_of_plugin, site):
    origin = {"distribution": "vt-plug", "version": "1.5", "module": "plug.heads"}
    for file in ("result.json", "adapter_config.json"):
        assert json.loads((run_of_plugin / file).read_text())["method_from"] == origin
    there = child("-m", "vtclip", "evaluate", str(run_of_plugin), "--json", site=site)
    assert there.returncode == 0, there.stderr
    missing = "method 'blend' is of the package vt-plug 1.5, which is not installed here"
    for words in (
        ["evaluate", str(run_of_plugin)],
        ["predict", str(run_of_plugin), str(ROOT / "docs" / "images" / "demo_heat_maps.png")],
        ["explain", str(run_of_plugin), str(ROOT / "docs" / "images" / "demo_heat_maps.png")],
        ["export", str(run_of_plugin), "--out", str(run_of_plugin.parent / "x.pt2")],
        [
            "extend",
            str(run_of_plugin),
            str(ROOT / "docs"),
            "--out",
            str(run_of_plugin.parent / "more"),
        ],
        ["repeat", str(run_of_plugin)],
    ):
        alone = child("-m", "vtclip", *words)
        assert alone.returncode == 2, (words, alone.stderr)
        assert missing in alone.stderr, (words, alone.stderr)
        assert alone.stderr.count("\n") == 1


def test_loading_imports_nothing_that_a_file_names(run_of_plugin, site, tmp_path, monkeypatch):
    code = (
        "import sys\nfrom vtclip.runs.adapter import load_adapter\n"
        f"sys.path.append({str(site / 'hidden')!r})\n"
        f"try:\n    load_adapter({str(run_of_plugin)!r})\n"
        "except ValueError as error:\n    print(error)\n"
        "print('plug' in sys.modules)\n"
    )
    hidden = site / "hidden" / "plug"  # the module is there, the distribution is not
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / "__init__.py").write_text("")
    (hidden / "heads.py").write_text(PLUGIN)
    done = child("-c", code)
    assert "is not installed here" in done.stdout, done.stderr
    assert done.stdout.endswith("False\n")


def spec(**changes: object) -> Spec:
    fields = {"name": "own_set", "title": "Own", "folder": "own", "images": "", "classes": 2,
              "template": "a {}.", "counts": (1, None, 1), "files": ("a.json",), "home": "",
              "lists": "", "read": lambda spec, root: None}  # fmt: skip
    return Spec(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "spec.name must be 'own_set', got 'other'"),
        ({"read": None}, "read must be callable"),
        ({"folder": "../x"}, "folder must be a path below the data root"),
        ({"files": ("/etc/passwd",)}, r"files\[0\] must be a path below the data root"),
        ({"files": ()}, "files must name what is on disk"),
        ({"template": "a photo"}, "template must hold {}"),
        ({"counts": (1, 2, None)}, "counts must be whole numbers"),
        ({"classes": "2"}, "classes and counts must be whole numbers"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        SETS.check("own_set", spec(**changes))
    assert "\n" not in str(caught.value)


def test_a_data_set_is_registered_once_and_known_by_its_spellings(clean):
    fields = {"folder": "own", "files": ["split.json"], "template": "a {}.", "classes": 2,
              "counts": (2, None, 2)}  # fmt: skip
    with pytest.raises(ValueError, match="'dtd' is 'dtd' already"):
        vtclip.register_data_set("dtd", **fields)
    with pytest.raises(ValueError, match="data set 'own_set': 'pets' is 'oxford_pets' already"):
        vtclip.register_data_set("own_set", **fields, aliases=["pets"])
    made = vtclip.register_data_set("own_set", **fields, aliases=["mine"])
    assert find_set("own_set") is find_set("Own Set") is find_set("MINE") is made
    with pytest.raises(ValueError, match="'own_set' is 'own_set' already"):
        vtclip.register_data_set("own_set", **fields)
    assert vtclip.register_data_set("own_set", **fields, replace=True) is SETS["own_set"]
    with pytest.raises(ValueError, match=r"unknown data set 'own_sat'; did you mean 'own_set'\?"):
        find_set("own_sat")
