"""The commands of `qhal`: our own, the suite's, and those that backends add (entry-point group `qhal.cli`)."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

import qhal
from qhal_cli import checkpoints, inspecting, machine, text
from qhal_cli.build import build
from qhal_cli.convert import convert
from qhal_cli.new_backend import new_backend
from qhal_cli.selftest import selftest
from qhal_cli.tune import tune
from qhal_conformance.commands import app as conformance

app = typer.Typer(
    name="qhal",
    help="One contract for quantized inference: look at checkpoints and accelerators, plan, convert, run, verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"qhal-core {qhal.__version__}, interface {'.'.join(map(str, qhal.INTERFACE_VERSION))}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """One contract for quantized inference: look at checkpoints and accelerators, plan, convert, run, verify."""


app.command()(machine.devices)
app.command()(machine.doctor)
app.command()(inspecting.inspect)
app.command()(checkpoints.plan)
app.command()(checkpoints.dequantize)
app.command()(checkpoints.quantize)
app.command()(convert)
app.command()(text.generate)
app.command()(selftest)
app.command()(tune)
app.command()(build)
app.command()(new_backend)
app.add_typer(conformance, name="conformance")

for _point in entry_points(group="qhal.cli"):
    try:
        app.add_typer(_point.load(), name=_point.name)
    except Exception as error:  # a backend's broken sub-command must not take ours down, and must not be silent
        typer.echo(f"qhal: the sub-command {_point.name!r} of {_point.value} cannot be loaded: {error}", err=True)
