# SPDX-License-Identifier: Apache-2.0
"""The loop: it learns, repeats itself bit by bit, resumes as if never stopped, and stops on NaN."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtclip.data.records import Batch, Records
from vtclip.data.splits import few_shot_split
from vtclip.distributed import STOPS, Interrupted
from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig
from vtclip.train import engine
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
CONFIG = FitConfig(epochs=6, lr=0.05, weight_decay=0.0, batch_size=8, checkpoint_every=2)


class Spied:
    """Records that report every batch they hand out, and may change it."""

    def __init__(self, records: Records, on_batch: Callable[[Tensor, Batch], Batch]) -> None:
        self._records, self._on_batch = records, on_batch
        self.num_passes, self.targets = records.num_passes, records.targets
        self.several = records.targets is not None

    def __len__(self) -> int:
        return len(self._records)

    def batch(self, index: Tensor, augment_pass: int = 0) -> Batch:
        return self._on_batch(index, self._records.batch(index, augment_pass))


def new_head(records: Records, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return HEADS["vtclip"](records.text, spatial_dim=records.spatial_width, logit_scale=20.0)


def run(
    records: Any,
    config: FitConfig = CONFIG,
    *,
    head: Any = None,
    seed: int = 1,
    source: Any = None,
    **options: Any,
) -> torch.nn.Module:
    real = source if source is not None else records
    split = few_shot_split(real.label, real.names, shots=8, seed=1)
    head = new_head(real) if head is None else head
    rows = engine.TrainingRows(records, split.train, split.val)
    training = TrainingRun(CPU, seed, **options)
    engine.train_head(head, rows, split.train, split.val, config, training)
    return head


def weights(head: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_overfits_a_few_images(records, optimizer):
    rows: list[dict[str, Any]] = []
    lr = 0.05 if optimizer == "sgd" else 5e-3
    config = dataclasses.replace(CONFIG, epochs=40, optimizer=optimizer, lr=lr)
    head = run(records, config, log=rows.append)
    train = few_shot_split(records.label, records.names, shots=8, seed=1).train
    logits, label = engine.all_logits(head, records, train, device=CPU)
    assert torch.equal(logits.argmax(1), label)
    assert rows[-1]["loss"] < 0.05 < rows[0]["loss"]
    assert [row["epoch"] for row in rows] == list(range(40))
    assert "val_accuracy" in rows[1]
    assert "val_accuracy" not in rows[0]


def test_same_seed_gives_the_same_bits(records):
    first = weights(run(records))
    assert_same_bits(first, weights(run(records)))
    other = weights(run(records, seed=2))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_epoch_sees_every_training_row_once(records):
    seen: list[int] = []

    def note(index: Tensor, batch: Batch) -> Batch:
        if torch.is_grad_enabled():
            seen.extend(index.tolist())
        return batch

    run(Spied(records, note), source=records)
    train = few_shot_split(records.label, records.names, shots=8, seed=1).train.tolist()
    epochs = [seen[start : start + len(train)] for start in range(0, len(seen), len(train))]
    assert len(epochs) == CONFIG.epochs
    assert all(sorted(epoch) == train for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("steps", "num_classes", "enough", "trained"),
    [
        (9, 18, 0, 20),
        (9, 18, 640_000, 20),
        (50, 100, 640_000, 4),
        (50, 100, 640_001, 5),
        (22, 45, 640_000, 20),
        (500, 1000, 640_000, 3),
        (1, 1, 1, 3),
    ],
)
def test_where_classes_are_many_fewer_epochs_are_trained(steps, num_classes, enough, trained):
    config = FitConfig(20, enough_pairs=enough, least_epochs=3, batch_size=32)
    assert config.num_epochs(steps, num_classes) == trained


def test_training_ends_with_the_epoch_that_is_enough(records):
    rows: list[dict[str, Any]] = []
    config = dataclasses.replace(CONFIG, epochs=9, warmup="linear")
    run(records, config, log=rows.append)
    enough = 3 * rows[0]["step"] * CONFIG.batch_size * len(records.class_names)
    cut: list[dict[str, Any]] = []
    head = run(records, dataclasses.replace(config, enough_pairs=enough), log=cut.append)
    assert [row["epoch"] for row in cut] == [0, 1, 2]
    # the learning rate falls to its end there: the weights of three epochs that were asked for
    short = run(records, dataclasses.replace(config, epochs=3))
    assert_same_bits(weights(head), weights(short))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop_at", [3, 4, 13, 24])  # inside, at the end of an epoch, last step
def test_interrupted_and_resumed_equals_uninterrupted(records, tmp_path, optimizer, stop_at):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, lr=0.01)
    losses: list[float] = []
    whole = weights(run(records, config, log=lambda row: losses.append(row["loss"])))
    steps = 0

    def interrupt(_: Tensor, batch: Batch) -> Batch:
        nonlocal steps
        if torch.is_grad_enabled():
            steps += 1
            if steps == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch

    checkpoint = Checkpoint(tmp_path / "state.safetensors", {"seed": 1})
    again: list[float] = []

    def log(row: dict[str, Any]) -> None:
        again.append(row["loss"])

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"SIGTERM after step {stop_at}") as caught:
        run(Spied(records, interrupt), config, source=records, checkpoint=checkpoint, log=log)
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    fresh = new_head(records, seed=99)  # every weight has to come from the file
    head = run(records, config, head=fresh, checkpoint=checkpoint, resume=True, log=log)
    assert_same_bits(whole, weights(head))
    assert again == losses


def test_a_crash_resumes_from_the_last_checkpoint(records, tmp_path):
    checkpoint = Checkpoint(tmp_path / "state.safetensors", {})

    def crash(row: dict[str, Any]) -> None:
        if row["epoch"] == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(records, checkpoint=checkpoint, log=crash)
    resumed: list[int] = []
    head = run(
        records, checkpoint=checkpoint, resume=True, log=lambda row: resumed.append(row["epoch"])
    )
    assert resumed == [4, 5]
    assert_same_bits(weights(run(records)), weights(head))


def test_resuming_another_run_is_refused_by_name(records, tmp_path):
    path = tmp_path / "state.safetensors"
    run(records, checkpoint=Checkpoint(path, {"seed": 1, "shots": 8}))
    with pytest.raises(ValueError, match="shots was 8, now it is 4"):
        run(records, checkpoint=Checkpoint(path, {"seed": 1, "shots": 4}), resume=True)


def test_parameters_of_another_shape_are_not_resumed(records, tmp_path):
    """As a head has them whose version keeps its projections otherwise."""
    path = tmp_path / "state.safetensors"
    run(records, checkpoint=Checkpoint(path, {}))
    before = path.read_bytes()
    torch.manual_seed(0)
    other = HEADS["vtclip"](
        records.text, spatial_dim=records.spatial_width, logit_scale=20.0, ffn_dim=24
    )
    with pytest.raises(ValueError, match=r"^cannot resume from .*: \S+ differs between") as caught:
        run(records, head=other, checkpoint=Checkpoint(path, {}), resume=True)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 7, 100, -1])
def test_a_cut_checkpoint_is_refused(records, tmp_path, cut):
    path = tmp_path / "state.safetensors"
    run(records, checkpoint=Checkpoint(path, {}))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a vtclip checkpoint"):
        run(records, checkpoint=Checkpoint(path, {}), resume=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_good_weights(records, bad):
    steps, kept = 0, {}
    head = new_head(records)

    def poison(_: Tensor, batch: Batch) -> Batch:
        nonlocal steps
        if not torch.is_grad_enabled():
            return batch
        steps += 1
        if steps == 9:
            kept.update(weights(head))  # produced by step 8 and not yet known to be good
            return dataclasses.replace(batch, image=batch.image * bad)
        if steps == 8:
            kept["good"] = torch.cat([p.detach().reshape(-1) for p in head.parameters()])
        return batch

    with pytest.raises(
        FloatingPointError, match=r"loss is not finite at step 8 \(epoch 2, lr"
    ) as error:
        run(Spied(records, poison), source=records, head=head)
    assert "last finite loss nan" not in str(error.value)
    now = torch.cat([p.detach().reshape(-1) for p in head.parameters()])
    assert torch.equal(now, kept["good"])


@pytest.mark.parametrize(
    ("what", "bad"), [("loss", math.nan), ("gradient", math.nan), ("gradient", math.inf)]
)
def test_what_is_not_finite_leaves_the_last_checkpoint(records, tmp_path, what, bad):
    checkpoint = Checkpoint(tmp_path / "state.safetensors", {})
    whole = weights(run(records))
    head, steps, entered = new_head(records), 0, {}

    def poison(_: Tensor, batch: Batch) -> Batch:
        nonlocal steps
        if not torch.is_grad_enabled():
            return batch
        steps += 1
        if steps == 10:  # eight steps are in the checkpoint
            entered.update(weights(head), file=checkpoint.path.read_bytes())
            if what == "loss":
                return dataclasses.replace(batch, image=batch.image * bad)
        return batch

    if what == "gradient":  # one number of one parameter, under a loss that is finite
        only = torch.zeros(head.text.shape[1])
        only[3] = bad
        bias = head.layers[0].norm3.bias
        bias.register_hook(lambda grad: grad + only if steps == 10 else None)
    with pytest.raises(FloatingPointError) as error:
        run(Spied(records, poison), source=records, head=head, checkpoint=checkpoint)
    message = (
        rf"fit: {what} is not finite at step 9 \(epoch 2, lr [\de.-]+, rows \[(\d+, ){{3}}\d+\]"
    )
    assert re.fullmatch(message + r"\.\.\.\), last finite loss \d[\de.-]*", str(error.value))
    assert checkpoint.path.read_bytes() == entered.pop("file")
    now = weights(head)
    assert all(bool(value.isfinite().all()) for value in now.values())
    if what == "gradient":  # weights whose loss was finite; the step was not taken
        assert_same_bits(now, entered)
    fresh = new_head(records, seed=99)
    assert_same_bits(whole, weights(run(records, head=fresh, checkpoint=checkpoint, resume=True)))


@pytest.mark.parametrize("signum", STOPS)
def test_every_signal_that_stops_saves_at_its_step(records, tmp_path, signum):
    checkpoint = Checkpoint(tmp_path / "state.safetensors", {})
    steps = 0

    def interrupt(_: Tensor, batch: Batch) -> Batch:
        nonlocal steps
        steps += torch.is_grad_enabled()
        if steps == 5:
            signal.raise_signal(signum)
        return batch

    name = signal.Signals(signum).name
    with pytest.raises(Interrupted, match=f"stopped by {name} after step 5; state saved"):
        run(Spied(records, interrupt), source=records, checkpoint=checkpoint)
    head = run(records, head=new_head(records, seed=99), checkpoint=checkpoint, resume=True)
    assert_same_bits(weights(run(records)), weights(head))


def test_an_absurd_learning_rate_leaves_finite_weights(records):
    head = new_head(records)
    for layer in head.layers:
        torch.nn.init.constant_(layer.norm3.weight, 3e38)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        run(records, head=head)
    assert all(bool(parameter.isfinite().all()) for parameter in head.parameters())


def test_a_test_row_in_training_raises(records):
    split = few_shot_split(records.label, records.names, shots=8, seed=1)
    rows = engine.TrainingRows(records, split.train, split.val)
    assert len(rows.batch(split.train).label) == len(split.train)
    with pytest.raises(IndexError, match="neither a training nor a validation row"):
        rows.batch(split.test[:1])
    stolen = torch.cat([split.train, split.test[:1]])
    for train, val in ((stolen, split.val), (split.test, split.val), (split.train, split.test)):
        with pytest.raises(IndexError, match="neither a training nor a validation row"):
            engine.train_head(new_head(records), rows, train, val, CONFIG, TrainingRun(CPU, 1))


def test_nothing_to_train_is_an_error(records):
    with pytest.raises(ValueError, match="no trainable parameters"):
        run(records, head=HEADS["zeroshot"](records.text))
    with pytest.raises(ValueError, match="no step to train"):
        run(records, dataclasses.replace(CONFIG, epochs=0))


def test_a_batch_larger_than_the_training_set_still_trains(records):
    before = weights(new_head(records))
    after = weights(run(records, dataclasses.replace(CONFIG, batch_size=1000)))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_learning_rate_follows_torch(records):
    config = dataclasses.replace(CONFIG, epochs=10, warmup_epochs=2, lr=0.3)
    assert [config.rate(number, 3) for number in range(6)] == [1e-5] * 6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(2, 10):
        # torch's form is a recursion: ten steps of rounding
        assert config.rate(3 * epoch + 2, 3) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12
        )
        optimizer.step()
        scheduler.step()


def test_linear_warm_up_follows_torch():
    config = dataclasses.replace(CONFIG, epochs=5, warmup="linear", lr=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    for number in range(4):
        assert config.rate(number, 4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        warm.step()
    for number in range(4, 20):
        assert config.rate(number, 4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_augmented_passes_are_used_in_turn_and_never_for_validation(records):
    image = torch.stack([records.batch(torch.arange(len(records))).image] * 3, dim=1)
    three = Records.from_tensors(image, records.label, records.text, records.class_names)
    assert three.num_passes == 2
    used: list[tuple[bool, int]] = []

    class Passes(Spied):
        def batch(self, index: Tensor, augment_pass: int = 0) -> Batch:
            used.append((torch.is_grad_enabled(), augment_pass))
            return records.batch(index)

    run(Passes(three, lambda index, batch: batch), source=records)
    training = [number for grad, number in used if grad]
    assert training == [1 + epoch % 2 for epoch in range(6) for _ in range(4)]
    assert {number for grad, number in used if not grad} == {0}


def test_evaluation_counts_each_row_once_and_refuses_nan(records):
    head = HEADS["zeroshot"](records.text, logit_scale=20.0)
    index = torch.arange(len(records))
    values = engine.head_metrics(head, records, index, device=CPU)
    batch = records.batch(index)
    right = head(batch.image).argmax(1) == batch.label
    assert values["accuracy"] == int(right.sum()) / len(records)
    assert values["count"] == len(records)
    with pytest.raises(ValueError, match="2 rows, of which 1 differ"):
        engine.head_metrics(head, records, torch.tensor([3, 3]), device=CPU)

    def poison(_: Tensor, batch: Batch) -> Batch:
        return dataclasses.replace(batch, image=batch.image * math.nan)

    with pytest.raises(FloatingPointError, match="logits must be finite"):
        engine.head_metrics(head, Spied(records, poison), index, device=CPU)


def test_logits_are_those_of_evaluation(records):
    """No dropout, and nothing that could be differentiated, whatever state the head is in."""
    head, modes = new_head(records).train(), []
    head.register_forward_pre_hook(
        lambda head, _: modes.append((head.training, torch.is_grad_enabled()))
    )
    logits, _ = engine.all_logits(head, records, torch.arange(len(records)), device=CPU)
    assert set(modes) == {(False, False)}
    assert not logits.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adma"}, "sgd or adamw"),
        ({"warmup": "none"}, "constant or linear"),
        ({"epochs": -1}, "epochs must be an integer >= 0"),
        ({"epochs": 1.5}, "epochs must be an integer >= 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"lr": 1e30}, "at most 1000"),
        ({"weight_decay": -1e-4}, "weight_decay must be in"),
        ({"weight_decay": math.nan}, "weight_decay must be in"),
        ({"warmup_lr": 0.0}, "warmup_lr must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_have_one_range(records, seed):
    with pytest.raises(ValueError, match="seed must be in 0..4294967295"):
        run(records, seed=seed)


def test_the_engine_is_short_and_names_no_method():
    text = Path(engine.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert not any(name in text for name in HEADS if name != "vtclip")
    assert "VTCLIP" not in text
