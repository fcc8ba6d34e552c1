from __future__ import annotations

import pytest

from lightkit.checkpoint.names import check_template, render
from lightkit.errors import ConfigError

VALUES = {"epoch": 3, "step": 1200, "val_loss": 0.12345678, "val/acc": 0.5}


@pytest.mark.parametrize(
    ("template", "auto", "name"),
    [
        ("{epoch}-{val_loss:.2f}", True, "epoch=3-val_loss=0.12"),
        ("{epoch:02d}-{step}", True, "epoch=03-step=1200"),
        ("{epoch}-{val/acc:.1f}", True, "epoch=3-val_acc=0.5"),
        ("e{epoch}-acc{val/acc:.3f}", False, "e3-acc0.500"),
        ("epoch={epoch}", True, "epoch=3"),
        ("best", True, "best"),
        ("sub/{val_loss}", True, "sub/val_loss=0.12346"),
        ("{epoch}.ckpt", True, "epoch=3"),
        ("{{x}}{epoch}", False, "{x}3"),
    ],
)
def test_rendered(template, auto, name):
    check_template(template)
    assert render(template, VALUES, auto) == name


def test_fields():
    assert check_template("{epoch}-{val_loss:.2f}") == ["epoch", "val_loss"]
    assert check_template("best") == []


def test_an_unknown_name_gives_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"'val_los', which is not logged\. Did you mean 'val_l"):
        render("{val_los}", VALUES, True)


def test_a_format_that_does_not_fit():
    with pytest.raises(ConfigError, match="field 'val_loss': Unknown format code 'd'"):
        render("{val_loss:d}", VALUES, True)


@pytest.mark.parametrize("template", ["", "{}", "{epoch", "/abs/{epoch}", "../{epoch}"])
def test_no_template(template):
    with pytest.raises(ConfigError, match="filename="):
        check_template(template)
