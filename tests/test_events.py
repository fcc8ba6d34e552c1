"""Functions as listeners, and what is added to a loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.errors import ConfigError, HookNameError, UsageError
from lightkit.events import PEERS, counter, hook_of
from lightkit.hook_names import LOOP_HOOKS
from lightkit.testing import assert_resumes_exactly

DECAY = 0.05


class Net(lk.TaskModule):
    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def penalty(trainer, task):
    return DECAY / 2 * sum(p.square().sum() for p in task.parameters())


def data(samples=20, batch_size=4, shuffle=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size, shuffle=shuffle)


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        defaults = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "max_epochs": 2,
            "fused": False,
        }
        return lk.Trainer(**defaults | options)

    return make


def weights(task):
    return [p.detach().clone() for p in task.parameters()]


def by_hand(groups=1, decay=DECAY, epochs=2, loader=None, weight_of=None):
    """A plain loop with the penalty in the loss; groups of batches are one big batch."""
    task = Net()
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    batches = list(loader or data())
    for _ in range(epochs):
        for i in range(0, len(batches), groups):
            group = batches[i : i + groups]
            optimizer.zero_grad()
            whole = [torch.cat(parts) for parts in zip(*group, strict=True)]
            (task.loss(whole) + decay / DECAY * penalty(None, task)).backward()
            optimizer.step()
    return weights(task)


# --- what is added to the loss -------------------------------------------------------------------


def test_s1_04_a_function_adds_l2_and_the_result_is_weight_decay(trainer):
    task, other = Net(), Net()
    made = trainer()

    @made.on("loss")
    def l2(trainer, task, loss):
        assert loss.requires_grad
        return penalty(trainer, task)

    made.fit(task, data())
    for ours, hand in zip(weights(task), by_hand(), strict=True):
        assert torch.equal(ours, hand)
    optimizer = torch.optim.SGD(other.parameters(), 0.1, weight_decay=DECAY)
    other.configure_optimizers = lambda: optimizer
    trainer().fit(other, data())
    for ours, decayed in zip(weights(task), weights(other), strict=True):
        assert torch.allclose(ours, decayed, atol=1e-6)


def test_s1_05_add_to_loss_in_one_line(trainer):
    task, made = Net(), trainer()
    assert made.add_to_loss(penalty) is penalty
    made.fit(task, data())
    assert all(map(torch.equal, weights(task), by_hand()))


def test_s1_05_without_a_loss_of_its_own(trainer):
    class Bare(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.tensor([3.0]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    task, made = Bare(), trainer()
    made.add_to_loss(lambda trainer, task: task.x.square().sum())
    made.fit(task, data())
    assert task.x.item() == pytest.approx(3 * 0.8**10, rel=1e-5)
    with pytest.raises(UsageError, match="defines no training_step"):
        trainer().fit(Bare(), data())


def test_without_a_loss_the_step_may_also_return_a_zero(trainer):
    class Zero(Net):
        def training_step(self, batch, batch_idx):
            return torch.zeros(())

        def on_loss(self, loss):
            return penalty(None, self)

    trainer().fit(Zero(), data())
    with pytest.raises(UsageError, match="does not depend on any trainable"):
        trainer(callbacks=[lk.callbacks.LambdaCallback(on_loss=lambda *_: torch.zeros(()))]).fit(
            type("Nothing", (Zero,), {"on_loss": lambda self, loss: None})(), data()
        )


def test_task_callbacks_and_functions_add_in_turn_and_see_what_was_added(trainer):
    seen = []

    class Adds(Net):
        def on_loss(self, loss):
            seen.append(loss.item())
            return loss.new_tensor(1.0)

    class Callback(lk.Callback):
        def on_loss(self, trainer, task, loss):
            seen.append(loss.item())
            loss.mul_(2)  # reads and changes: S1-03

    made = trainer(callbacks=[Callback()], max_steps=1)
    made.on("loss", lambda trainer, task, loss: seen.append(loss.item()))
    outputs = []
    made.on(
        "train_batch_end", lambda trainer, task, outputs_: outputs.append(outputs_["loss"].item())
    )
    history = made.fit(Adds(), data())
    first = seen[0]
    assert seen == pytest.approx([first, first + 1, 2 * (first + 1)])
    assert history[-1]["train_loss"] == outputs[0] == pytest.approx(2 * (first + 1))


@pytest.mark.parametrize("batches", [2, 3])
def test_accumulation_adds_once_per_step_also_in_a_ragged_tail(trainer, batches):
    task, made = Net(), trainer(accumulate_grad_batches=batches)
    made.add_to_loss(penalty)
    made.fit(task, data(18))
    for ours, hand in zip(weights(task), by_hand(batches, loader=data(18)), strict=True):
        assert torch.allclose(ours, hand, atol=1e-6)


def test_with_weights_it_is_added_once_per_step(trainer):
    class Weighted(Net):
        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch), "weight": len(batch[0])}

    task, made = Weighted(), trainer(accumulate_grad_batches=2)
    made.add_to_loss(penalty)
    made.fit(task, data(18))
    for ours, hand in zip(weights(task), by_hand(2, loader=data(18)), strict=True):
        assert torch.allclose(ours, hand, atol=1e-6)


def test_it_is_scaled_with_the_loss_under_16_mixed(trainer):
    class Constant(Net):
        def training_step(self, batch, batch_idx):
            return self.net[0].weight.sum() * 0

    gradients, made = [], trainer(precision="16-mixed", max_steps=1)
    made.add_to_loss(penalty)
    made.on(
        "before_optimizer_step",
        lambda trainer, task: gradients.extend(p.grad.clone() for p in task.parameters()),
    )
    task = Constant()
    before = weights(task)
    made.fit(task, data())
    for gradient, value in zip(gradients, before, strict=True):
        assert torch.allclose(gradient, DECAY * value)


def test_optimizers_that_ask_again_get_it_each_time(trainer):
    class Closure(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=4)

    calls, task, made = [], Closure(), trainer(max_steps=1)
    made.add_to_loss(lambda trainer, task: calls.append(0) or penalty(trainer, task))
    made.fit(task, data())
    hand = Net()
    optimizer = torch.optim.LBFGS(hand.parameters(), 0.1, max_iter=4)
    batch = next(iter(data()))

    def closure():
        optimizer.zero_grad()
        loss = hand.loss(batch) + penalty(None, hand)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert all(map(torch.equal, weights(task), weights(hand)))


def test_manual_backward_adds_it_too(trainer):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    task, made = Manual(), trainer()
    made.add_to_loss(penalty)
    made.fit(task, data())
    assert all(map(torch.equal, weights(task), by_hand()))


def test_a_skipped_batch_is_skipped(trainer):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None

    made, calls = trainer(), []
    made.on("loss", lambda: calls.append(0))
    task = Skips()
    before = weights(task)
    made.fit(task, data())
    assert not calls
    assert all(map(torch.equal, before, weights(task)))


@pytest.mark.parametrize(
    ("returned", "says"),
    [(0.5, "returned 0.5"), (torch.ones(3), r"shape \(3,\)")],
)
def test_what_cannot_be_added(trainer, returned, says):
    made = trainer()
    made.on("loss", lambda: returned)
    with pytest.raises(UsageError, match=f"on_loss returned .*{says.removeprefix('returned ')}"):
        made.fit(Net(), data())


def test_a_forgotten_return_is_noticed(trainer):
    made = trainer()

    @made.add_to_loss
    def forgets(trainer, task):
        penalty(trainer, task)

    with pytest.raises(UsageError, match="forgets, given to trainer.add_to_loss, returned None"):
        made.fit(Net(), data())


# --- trainer.on ----------------------------------------------------------------------------------


def test_s3_02_every_hook_is_an_event():
    for name in LOOP_HOOKS:
        assert hook_of(name) == hook_of(name.removeprefix("on_")) == name


def test_s3_02_the_events_of_a_fit_exceptions_included(trainer):
    calls = []

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise KeyError("own")
            return super().training_step(batch, batch_idx)

    made = trainer()
    for event in ("fit_start", "train_epoch_start", "train_batch_end", "teardown"):
        made.on(event, lambda *_, event=event: calls.append(event))
    made.on("exception", lambda trainer, task, error: calls.append(type(error)))
    with pytest.raises(KeyError):
        made.fit(Fails(), data())
    batches = ["train_batch_end"] * 2
    assert calls == ["fit_start", "train_epoch_start", *batches, KeyError, "teardown"]


def test_s3_03_functions_come_after_the_callbacks_in_the_order_of_registration(trainer):
    calls = []

    class Task(Net):
        def on_train_start(self):
            calls.append("task")

    first = lk.callbacks.LambdaCallback(on_train_start=lambda *_: calls.append("callback"))
    made = trainer(callbacks=[first])

    @made.on("train_start")
    def one():
        calls.append("one")

    @made.on("on_train_start")
    def two(trainer):
        calls.append("two")

    one()  # it stays a function
    calls.clear()
    made.fit(Task(), data())
    assert calls == ["task", "callback", "one", "two"]


def test_a_function_may_log_before_the_row_is_written(trainer):
    made = trainer()
    made.on("train_batch_end", lambda trainer, task: task.log("mine", 3.0))
    assert made.fit(Net(), data())[-1]["mine"] == 3.0


@pytest.mark.parametrize(
    ("how", "at"),
    [
        ({"every": 4}, [4, 8]),
        ({"once": 3}, [3]),
        ({"once": True}, [1]),
        ({"before": 3}, [1, 2]),
        ({"after": 8}, [9, 10]),
        ({"after": 2, "before": 9, "every": 3}, [3, 6]),
        ({"filter": lambda trainer, number: number % 5 == 0}, [5, 10]),
        ({"filter": lambda trainer: trainer.state.batch_idx % 5 == 2}, [2, 7]),
        ({"rank_zero": True, "every": 5}, [5, 10]),
    ],
)
def test_s3_08_when_a_function_is_called(trainer, how, at):
    """The last filter but one is relative to the epoch: its batches are counted in the state."""
    found, made = [], trainer()
    made.on("train_batch_end", lambda trainer: found.append(trainer.global_step), **how)
    made.fit(Net(), data())
    assert found == at


@pytest.mark.parametrize(
    ("event", "numbers"),
    [
        ("train_batch_start", range(1, 11)),
        ("loss", range(1, 11)),
        ("after_backward", range(1, 11)),
        ("train_batch_end", range(1, 11)),
        ("before_zero_grad", range(1, 7)),
        ("before_optimizer_step", range(1, 7)),
        ("save_point", range(1, 7)),
        ("train_epoch_start", range(1, 3)),
        ("train_epoch_end", range(1, 3)),
        ("validation_start", range(1, 3)),
        ("validation_epoch_end", range(1, 3)),
        ("validation_batch_start", [1, 2, 1, 2]),
        ("validation_batch_end", [1, 2, 1, 2]),
    ],
)
def test_what_is_counted(trainer, event, numbers):
    found = []
    made = trainer(accumulate_grad_batches=2, num_sanity_val_steps=1)
    made.on(event, lambda: None, every=1, filter=lambda trainer, number: found.append(number))
    made.fit(Net(), data(), data(8))
    assert found == list(numbers)


def test_numbers_go_on_in_a_run_that_is_continued(trainer, tmp_path):
    def numbers(**call):
        found = []
        made = trainer(enable_checkpointing=True)
        made.on("train_batch_end", lambda trainer: found.append(trainer.global_step), every=4)
        made.on("train_epoch_end", lambda: found.append("epoch"), once=2)
        made.fit(Net(), data(), **call)
        return made, found

    first, found = numbers(max_steps=7)
    assert found == [4, "epoch"]  # the second epoch, though it is cut off
    _, found = numbers(ckpt_path=first.checkpoint_callback.last_model_path)
    assert found == [8, "epoch"]


def test_runs_with_functions_resume_exactly():
    def added():
        return [
            lk.callbacks.LambdaCallback(on_loss=lambda trainer, task, _: penalty(trainer, task))
        ]

    assert_resumes_exactly(Net, data(shuffle=True), callbacks=added)


PEER_NAMES = [(peer, name) for peer, names in PEERS.items() for name in names]


@pytest.mark.parametrize(("peer", "name"), PEER_NAMES)
def test_names_of_peers_are_answered_with_ours(trainer, peer, name):
    ours = PEERS[peer][name]
    assert hook_of(ours) in LOOP_HOOKS
    given = f"Events.{name.upper()}" if peer == "ignite" else f"on_{name}"
    with pytest.raises(HookNameError, match=f"an event of {peer}. Here it is '{ours}'"):
        trainer().on(given)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ("train_batch_ned", "Did you mean 'train_batch_end'"),
        ("train_epoch_ends", "Did you mean 'train_epoch_end'"),
        ("on_epoch_end", "write on_train_epoch_end"),
        ("xyz", "The events are the hooks without 'on_': fit_start"),
    ],
)
def test_unknown_events(trainer, event, says):
    with pytest.raises(HookNameError, match=says):
        trainer().on(event)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.0}, "every=2.0"),
        ({"once": -1}, "once=-1"),
        ({"before": 1}, "a number from 2 on"),
        ({"after": -1}, "a number from 0 on"),
        ({"filter": 3}, "filter=3"),
        ({"before": 5, "after": 4}, r"before=5, after=4\): no event has a number like that"),
        ({"every": 4, "once": 6}, "no event has a number like that"),
        ({"every": 4, "before": 4}, "no event has a number like that"),
        ({"every": 4, "after": 5, "before": 8}, "no event has a number like that"),
    ],
)
def test_conditions_that_cannot_be(trainer, how, says):
    with pytest.raises(ConfigError, match=says):
        trainer().on("train_batch_end", **how)


def test_what_comes_once_has_no_number(trainer):
    assert counter("on_fit_end") is None
    with pytest.raises(ConfigError, match="comes once in a call"):
        trainer().on("fit_end", lambda: None, every=2)


def test_other_mistakes(trainer):
    made = trainer()
    with pytest.raises(UsageError, match="a function is needed, not int"):
        made.on("fit_end", 3)
    with pytest.raises(UsageError, match="a function is needed, not int"):
        made.add_to_loss(3)
    with pytest.raises(ConfigError, match="another loss than the other ranks"):
        made.on("loss", lambda: None, rank_zero=True)
    made.on("train_start", lambda trainer: trainer.on("train_end", lambda: None))
    with pytest.raises(UsageError, match="while fit runs, whose listeners are settled"):
        made.fit(Net(), data())


@pytest.mark.parametrize("how", [{}, {"once": 2}])
def test_arguments_with_a_default_of_their_own_keep_it(trainer, how):
    found, made = [], trainer()
    for tag in "ab":
        made.on("train_epoch_end", lambda trainer, tag=tag: found.append(tag), **how)
    made.on(
        "train_epoch_end",
        lambda trainer, task=None, *, tag="c": found.append((task is not None, tag)),
        filter=lambda trainer, wanted=2: trainer.current_epoch + 1 == wanted,
    )
    made.fit(Net(), data())
    assert found == ["a", "b"] * (1 if how else 2) + [(True, "c")]


def test_conditions_that_one_event_meets_are_taken(trainer):
    found, made = [], trainer()
    for how in ({"every": 4, "before": 5}, {"every": 3, "once": 6}, {"after": 1, "before": 3}):
        made.on("train_batch_end", lambda trainer: found.append(trainer.global_step), **how)
    made.fit(Net(), data())
    assert found == [2, 4, 6]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda trainer, task, outputs: None, r"gets \(trainer, task\).*arguments outputs"),
        (lambda trainer, *, more: None, "nothing for its arguments more"),
    ],
)
def test_a_function_that_needs_more_than_there_is(trainer, function, says):
    """Not after hours, when its event comes."""
    with pytest.raises(UsageError, match=says):
        trainer().on("fit_end", function)
    with pytest.raises(UsageError, match=r"filter gets \(trainer, number\)"):
        trainer().on("train_batch_end", print, filter=lambda trainer, number, more: True)


def test_a_profiler_knows_functions_by_their_names(trainer):
    made = trainer(max_epochs=1)

    @made.on("train_batch_end", every=2)
    def watch():
        pass

    made.fit(Net(), data())
    parts = {part.name: part.calls for part in made.session.flow.times.parts}
    assert parts["watch.on_train_batch_end"] == 5


def test_evaluations_have_the_functions_too(trainer):
    made, calls = trainer(), []
    made.on("test_batch_end", lambda trainer, task, outputs, batch, index: calls.append(index))
    made.on("predict_end", lambda: calls.append("end"))
    task = Net()
    task.forward = lambda x: task.net(x)
    made.test(task, data(8), verbose=False)
    made.predict(task, data(8))
    assert calls == [0, 1, "end"]


def test_s3_10_the_state_of_a_run_is_visible(trainer):
    seen, made = [], trainer(max_epochs=1)

    @made.on("train_batch_end", once=3)
    def look(trainer, task, outputs, batch, batch_idx):
        state = trainer.state
        seen.extend((state.epoch, state.global_step, state.batch_idx, batch_idx))
        seen.append(torch.equal(trainer.callback_metrics["train_loss"], outputs["loss"]))
        task.kept = batch[0]  # a name of its own on the task: S1-13
        trainer.should_stop = True  # S1-03

    task = Net()
    made.fit(task, data())
    assert seen == [0, 3, 3, 2, True]
    assert torch.equal(task.kept, list(data())[2][0])
    assert made.global_step == 3
