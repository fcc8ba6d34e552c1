"""Every code block of README and docs runs, and what the pages say of the files is true."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import lightkit
from tests import own_data

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("templates/*/README.md"))
)
#: A page with this link begins with the definitions of the quickstart.
USES_QUICKSTART = "of the [quickstart](index.md)"
#: Runs of the command line are cut short by these.
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
#: Other programs that a block may call; the gate and the reader run them.
PROGRAMS = {".", "cd", "mkdocs", "pip", "pytest", "python3", "tensorboard", ".ci/run"}


@dataclass
class Block:
    page: str
    line: int
    language: str
    code: str
    skipped: str | None  # the reason


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, in their order."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    i = 0
    while i < len(lines):
        fence = re.match(r"( *)```(\w*)", lines[i])
        if not fence:
            i += 1
            continue
        end = next(n for n in range(i + 1, len(lines)) if lines[n].strip() == "```")
        mark = re.fullmatch(r"\s*<!-- not run: (.+) -->", lines[i - 1]) if i else None
        code = textwrap.dedent("\n".join(lines[i + 1 : end]))
        found.append(Block(page, i + 2, fence[2], code, mark and mark[1]))
        i = end + 1
    return found


def run_python(block: Block, module: types.ModuleType) -> None:
    """Executes a block so that tracebacks show its lines on the page."""
    name = f"{block.page}, line {block.line}"
    linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
    exec(compile(block.code, name, "exec"), module.__dict__)


def run_shell(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what is lightkit's in a block, cut short; refuses programs that are not known."""
    from lightkit.cli import main

    for line in block.code.splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if not words:
                continue
            program = words[0].removeprefix(".venv/bin/")
            if program == "lightkit":
                # What a folder's modules left behind must not be found in the next one.
                for name in ("model", "data"):
                    monkeypatch.delitem(sys.modules, name, raising=False)
                monkeypatch.setattr(
                    sys, "path", [p for p in sys.path if not p.startswith(str(folder))]
                )
                trains = {"fit", "demo"} & set(words) and "--print_config" not in words
                short = [flag for flag in SHORT if flag.partition("=")[0] not in words]
                assert main([*words[1:], *(short if trains else ())]) == 0, command
            elif program == "cd":
                monkeypatch.chdir(words[1])
            else:
                assert program in PROGRAMS | {"ruff", "mypy"}, f"{block.page}: {command}"


def check_unread(block: Block) -> None:
    """A block that is not run is code all the same, and what its reason names is there."""
    for path in re.findall(r"tests/[\w/.]+", block.skipped or ""):
        assert (ROOT / path).is_file(), f"{block.page}, line {block.line}: {path}"
    if block.language == "python":
        compile(block.code, f"{block.page}, line {block.line}", "exec")
    elif block.language == "bash":
        done = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
        assert done.returncode == 0, f"{block.page}, line {block.line}: {done.stderr}"


def check_yaml(block: Block) -> None:
    from lightkit.config import KEYS, build, read_sources, resolve

    tree = yaml.safe_load(block.code)
    if isinstance(tree, dict) and set(tree) <= set(KEYS):
        Path("block.yaml").write_text(block.code, encoding="utf-8")
        # What names no task is an overlay.
        files = ["block.yaml"] if "task" in tree else ["configs/digits.yaml", "block.yaml"]
        build(resolve(read_sources(files, {}, "page")))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone and may be written to."""
    ignore = shutil.ignore_patterns("__pycache__", "runs")
    for name in ("configs", "templates"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    monkeypatch.chdir(tmp_path)
    others = [path for path in sys.path if path not in ("", str(ROOT))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"templates", "model", "data", "page"}:
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks(page, clone, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    if USES_QUICKSTART in (ROOT / page).read_text(encoding="utf-8"):
        run_python(next(b for b in blocks("docs/index.md") if b.language == "python"), module)
    module.__dict__["lk"] = lightkit
    if page.startswith("templates/"):  # its commands are for the copy
        from lightkit._share import copy_template

        copy_template(page.split("/")[1], clone / "copy")
        own_data.write(page.split("/")[1], clone / "copy")
        monkeypatch.chdir(clone / "copy")
    for block in blocks(page):
        if block.skipped:
            check_unread(block)
        elif block.code.startswith("# data.py, "):
            with Path("data.py").open("a", encoding="utf-8") as file:  # what is later there holds
                file.write(f"\n\n{block.code}\n")
        elif block.language == "python":
            run_python(block, module)
        elif block.language == "bash":
            run_shell(block, clone, monkeypatch)
            monkeypatch.chdir(clone / "copy" if page.startswith("templates/") else clone)
        elif block.language == "yaml":
            check_yaml(block)
        else:
            assert block.language == "text", f"{page}, line {block.line}: name the language"


def test_the_order_of_hooks_stands_on_the_page():
    docstring = ast.get_docstring(ast.parse((ROOT / "lightkit/hooks.py").read_text("utf-8")))
    drawn = docstring.partition("::\n")[2].partition("\nFor one hook")[0]
    drawn = textwrap.dedent(drawn).strip()
    page = (DOCS / "loop.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- the order of hooks -->\n```text\n")[2].partition("\n```")[0]
    assert shown == drawn


def drawn_order() -> list[str]:
    """Unrolls the drawing for one epoch of one batch with a validation of one batch at its end."""
    page = (DOCS / "loop.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- the order of hooks -->\n```text\n")[2].partition("\n```")[0]
    shown = re.sub(r"#.*", "", shown)  # comments
    fit, _, validation = shown.partition("\nvalidation:\n")
    name = re.compile(r"\b(?:on|setup|teardown|configure|transfer|training|validation)_?[a-z_]*\b")
    transfer = re.findall(r"\w*batch_transfer\w*|transfer_batch_to_device", fit)
    evaluation = name.findall(validation.replace("(transfer hooks)", ", ".join(transfer)))
    order = ["prepare_data"]  # "before it"
    for line in fit.splitlines():
        if "on_sanity_check" in line or "due at this step" in line:
            continue
        line = re.sub(r"\((?!\"fit\").*?\)", "", line)  # what is no hook
        found = evaluation if "due at this epoch" in line else name.findall(line)
        order += [hook for hook in found if hook != "prepare_data"]
    order.remove("on_save_point")  # "instead of the last step's"
    return order


def test_the_order_on_the_page_is_that_of_a_run(tmp_path):
    import torch

    from lightkit.hook_names import TASK_NAMES

    called: list[str] = []

    def recording(name: str):
        def hook(self, *args):
            called.append(name)
            inherited = getattr(super(Recorder, self), name, None)
            return inherited(*args) if inherited else None

        return hook

    class Net(lightkit.TaskModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, *_):
            return self.layer(batch).sum()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    drawn = drawn_order()
    assert set(drawn) <= TASK_NAMES
    Recorder = type("Recorder", (Net,), {name: recording(name) for name in set(drawn)})
    trainer = lightkit.Trainer(
        max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, enable_checkpointing=False
    )
    loaders = [torch.utils.data.DataLoader(torch.randn(1, 2)) for _ in range(2)]
    trainer.fit(Recorder(), *loaders)
    assert called == drawn
    assert len(drawn) > 25


def test_what_the_drawing_leaves_out_is_said_as_it_is(tmp_path):
    """Checkpoints, exceptions, evaluations alone, and the pieces of the loop that are replaced."""
    import torch

    from tests import small

    called: list[str] = []

    def recording(name: str):
        def hook(self, *args, **kwargs):
            called.append(name)
            return getattr(super(Recorder, self), name)(*args, **kwargs)

        return hook

    class Net(small.Net):
        def training_step(self, batch, batch_idx):
            if self.broken:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            return Net.training_step(self, batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    replaced = [*("configure_callbacks", "optimizer_zero_grad", "backward", "optimizer_step")]
    replaced += ["configure_gradient_clipping", "lr_scheduler_step"]
    page = (DOCS / "loop.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}`" in page for name in replaced)
    names = {*drawn_order(), *replaced, "on_exception", "on_save_checkpoint", "on_load_checkpoint"}
    names |= {name.replace("_validation_", "_test_") for name in names if "_validation_" in name}
    names -= {"training_step", "validation_step"}
    Recorder = type("Recorder", (Net,), {name: recording(name) for name in names})
    Recorder.broken = False

    def trainer(epochs):
        options = {"num_sanity_val_steps": 0, "rehearse": False, "gradient_clip_val": 1.0}
        return lightkit.Trainer(
            max_epochs=epochs, limit_train_batches=1, default_root_dir=tmp_path, **options
        )

    def in_this_order(*some):
        assert [name for name in called if name in some] == [*some]

    trainer(1).fit(Recorder(), small.loader())
    assert called[0] == "configure_callbacks"
    in_this_order("on_before_zero_grad", "optimizer_zero_grad")
    in_this_order("on_before_backward", "backward", "on_after_backward")
    in_this_order(
        *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step"),
        *("lr_scheduler_step", "on_train_batch_end", "on_save_checkpoint", "on_train_end"),
    )
    called.clear()
    trainer(2).fit(Recorder(), small.loader(), ckpt_path=next(tmp_path.rglob("last.ckpt")))
    in_this_order("configure_optimizers", "on_load_checkpoint", "on_fit_start")
    called.clear()
    trainer(1).test(Recorder(), small.loader())
    alone = ["configure_callbacks", "prepare_data", "setup", "configure_model", "on_test_start"]
    assert called[:5] == alone
    assert called[-3:] == ["on_test_epoch_end", "on_test_end", "teardown"]
    called.clear()
    Recorder.broken = True
    with pytest.raises(ZeroDivisionError):
        trainer(1).fit(Recorder(), small.loader())
    assert called[-2:] == ["on_exception", "teardown"]


def test_every_hook_is_in_the_order_or_named_beside_it():
    from lightkit.hook_names import LOOP_HOOKS

    page = (DOCS / "loop.md").read_text(encoding="utf-8")
    # Test and prediction repeat the validation's.
    missing = [
        hook
        for hook in LOOP_HOOKS
        if hook not in page and not re.match(r"on_(test|predict)_", hook)
    ]
    assert missing == []


def test_the_layout_is_the_package():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    block = page.partition("<!-- the layout -->\n```text\n")[2].partition("\n```")[0]
    drawn = re.findall(r"^  ([\w.]+/?)", block, re.MULTILINE)
    files = [path.name for path in (ROOT / "lightkit").glob("*.py")]
    folders = [f"{path.parent.name}/" for path in (ROOT / "lightkit").glob("*/__init__.py")]
    assert sorted(drawn) == sorted(files + folders)


def prose_of(path: Path) -> str:
    """Returns a page without its blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Returns the anchors of the titles of a page."""
    titles = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    prose = prose_of(ROOT / page)
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"^\[.+\]: (\S+)$", prose, re.M)
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = folder / file if file else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"
    for path in re.findall(r"`((?:tests|lightkit|configs|templates|docs)/[\w./-]*)`", prose):
        assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_navigation_has_every_page_and_no_dead_link():
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    shown = re.findall(r": (\S+\.md)$", settings, re.M)
    assert sorted(shown) == sorted(path.name for path in DOCS.glob("*.md"))
    within = re.findall(r": ([\w-]+)/#(\S+)$", settings, re.M)
    assert len(within) > 2
    assert [link for link in within if link[1] not in anchors(DOCS / f"{link[0]}.md")] == []
    assert all((DOCS / file).is_file() for file in re.findall(r"extra_css: \[(\S+)\]", settings))


#: Their tables quote other libraries.
QUOTING = {"docs/keras.md", "docs/sklearn.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in QUOTING])
def test_calls_in_the_text_are_accepted(page, tmp_path, monkeypatch):
    """``ModelCheckpoint(save_top_k=3)`` in a table is copied like a block of code."""
    monkeypatch.chdir(tmp_path)
    rooms = (lightkit, lightkit.callbacks, lightkit.loggers)
    names = {name: getattr(room, name) for room in rooms for name in room.__all__}
    for code in re.findall(r"`([^`]+)`", prose_of(ROOT / page)):
        try:
            call = ast.parse(" ".join(code.split()), mode="eval").body
        except SyntaxError:
            continue
        if not isinstance(call, ast.Call):
            continue
        made = names.get(ast.unparse(call.func).rpartition(".")[2])
        given = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
        if isinstance(made, type) and ... not in given:
            with contextlib.suppress(NameError):  # `lk.Trainer(max_epochs=n)`
                eval(ast.unparse(call), {**names, "lk": lightkit})


def test_extras_in_the_text_exist():
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    part = settings.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    there = set(re.findall(r"^([\w-]+) = \[", part, re.MULTILINE))
    text = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
    named = re.findall(r"(?:lightkit|'\.|\"\.)\[([\w,-]+)\]", text)
    assert len(named) > 10
    assert {one for several in named for one in several.split(",")} <= there


def test_every_argument_of_the_trainer_is_on_its_page():
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(inspect.signature(lightkit.Trainer).parameters) - listed == set()


def test_all_callbacks_are_on_the_page():
    page = (DOCS / "callbacks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == set(lightkit.callbacks.__all__) - {"Callback"}


def test_every_template_is_on_the_page_of_how_tos():
    from lightkit._share import templates

    page = (DOCS / "how-to.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`lightkit new ([a-z-]+)`", page)) == set(templates())
