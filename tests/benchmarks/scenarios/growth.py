"""How the cost of a step grows: logged names, callbacks, parameters, steps. Beside a loop by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from tests.benchmarks import fresh
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Spread, Table

#: Kinds of growth, and the amounts of each.
KINDS = {
    "names": (0, 1, 10, 100),
    "callbacks that do not listen": (0, 5, 50),
    "callbacks that listen to each batch": (0, 5, 50),
    "parameter tensors": (4, 10, 100, 1000),
}
HEADER = ("", "", "time to the loop by hand", "us beyond it a step")


def measure(kind: str, amount: int, rounds: int, at: list[int]) -> dict[str, Any]:
    """Runs one fit beside a loop by hand; the times of its chunks by place, and the memory there."""
    import torch

    import lightkit as lk
    from tests.benchmarks.beside import Beside
    from tests.benchmarks.contenders.ours import BARE
    from tests.benchmarks.works import loss_of

    torch.set_num_threads(1)
    names = [f"value_{i}" for i in range(amount)] if kind == "names" else []
    parameters = amount if kind == "parameter tensors" else 4

    class Task(lk.TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(parameters)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = loss_of(self.net(x), y)
            for name in names:
                self.log(name, loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    class Listening(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            pass

    class Deaf(lk.Callback):
        def on_fit_end(self, trainer, task):
            pass

    kinds = {"callbacks that listen to each batch": Listening, "callbacks that do not listen": Deaf}
    net = network(parameters)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    batch = torch.randn(32, 64), torch.randint(0, 10, (32,))

    def hand(steps: int) -> None:
        for _ in range(steps):
            x, y = batch
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()

    chunk = 5 if parameters > 100 else 20
    beside = Beside(hand, batch, chunk=chunk, rounds=rounds, at=tuple(at))
    with tempfile.TemporaryDirectory() as folder:
        # Rows are written where values are logged: they belong to what logging costs.
        options = {**BARE, "logger": bool(names) or kind == "steps"}
        if kind in kinds:
            options["callbacks"] = [kinds[kind]() for _ in range(amount)]
        trainer = lk.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **options)
        trainer.fit(Task(), beside)
    return {
        "ratios": [beside.ratios(place) for place in at],
        "beyond": [beside.beyond(place) for place in at],
        "memory": [beside.memory[place] for place in at],
    }


def network(parameters: int) -> Any:
    """Returns a network 64-64-10, with further small layers for more parameter tensors."""
    from torch import nn

    more = [nn.Linear(16, 16) for _ in range((parameters - 4) // 2)]
    return nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16 if more else 10)),
        *more,
        *([nn.Linear(16, 10)] if more else []),
    )


def tables(plan: Plan) -> Iterator[Table]:
    rounds = 3 if plan.quick else 10 * plan.rounds
    for kind, amounts in KINDS.items():
        rows = []
        for amount in amounts:
            plan.say(f"growth: {amount} {kind}")
            found = _measured(kind, amount, rounds, [0])
            rows.append((f"{amount:,}", kind, *shown(found, 0)))
        name = kind.replace("names", "names logged in each step").capitalize()
        yield Table(f"growth/{kind.replace(' ', '-')}", name, HEADER, rows)
    yield steps_table(plan, rounds)


def steps_table(plan: Plan, rounds: int) -> Table:
    """Measures within one fit, after so many steps; memory there beside it."""
    at = [100, 1000] if plan.quick else [1_000, 10_000, 100_000]
    if plan.long:
        at.append(1_000_000)
    plan.say(f"growth: {at[-1]:,} steps of one fit")
    found = _measured("steps", 0, rounds, at)
    rows = [
        (f"{place:,}", "steps before", *shown(found, i), f"{found['memory'][i]:.1f}")
        for i, place in enumerate(at)
    ]
    header = (*HEADER, "MiB held")
    return Table(
        "growth/steps", "One long fit, the loss in TensorBoard every 50 steps", header, rows
    )


def shown(found: dict[str, Any], place: int) -> tuple[str, str]:
    """Returns the cells of a row."""
    ratio, beyond = (Spread.of(found[key][place]) for key in ("ratios", "beyond"))
    return ratio.show(), beyond.show(1)


def _measured(kind: str, amount: int, rounds: int, at: list[int]) -> dict[str, Any]:
    arguments = {"kind": kind, "amount": amount, "rounds": rounds, "at": at}
    return fresh.call("tests.benchmarks.scenarios.growth:measure", **arguments)
