"""``refitkit compile``: a program into a file that can be refitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.options import (
    as_options,
    common_options,
    config_options,
    file_argument,
    file_option,
)
from refitkit.cli.tables import count, duration, facts, size

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from refitkit.cli.session import Session


@click.command("compile", short_help="Compile a program into a module that can be refitted.")
@file_argument("program")
@file_option("-o", "--output", required=True, help="Where to write the compiled module.")
@click.option("--backend", default="aotinductor", show_default=True, help="What compiles it.")
@click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=as_options,
    help="An option of the backend; VALUE is JSON or text. Can be given several times.",
)
@click.option(
    "--prove/--no-prove",
    default=True,
    show_default=True,
    help="Try with other weights than the program's that the module can be refitted.",
)
@config_options
@common_options
@click.pass_obj
def compile_command(
    session: Session,
    program: Path,
    output: Path,
    backend: str,
    options: dict[str, Any],
    *,
    prove: bool,
) -> None:
    """Compile PROGRAM, a file of torch.export.save, into a module that can be refitted.

    Loading such a program can run code that is in the file: use only files that you trust.
    """
    from refitkit.cli.files import bytes_of, check_module_folder, check_output, load_program

    check_output(output, program, folders=True)
    pipeline = session.pipeline()
    check_module_folder(pipeline, output)
    pipeline.backend(backend)  # a misspelt name is told before the program is loaded
    loaded = load_program(program, verbose=session.verbose)
    compiled = pipeline.compile(loaded, backend, options, prove=prove)
    compiled.save(output)
    slots = compiled.slots
    data = {
        "output": str(output),
        "backend": compiled.backend,
        "slots": len(slots),
        "weight_bytes": sum(slot.nbytes for slot in slots),
        "file_bytes": bytes_of(output),
        "stages": [
            {"verb": done.verb, "stage": done.stage, "seconds": done.seconds}
            for done in session.progress.finished
            if done.verb != "refit"  # a trial, which is a part of compiling
        ],
    }
    session.result(data, lambda console: _print(console, data))


def _print(console: Console, data: dict[str, Any]) -> None:
    times = ", ".join(f"{one['stage']} {duration(one['seconds'])}" for one in data["stages"])
    weights = f"{count(data['slots'], 'slot')} of {size(data['weight_bytes'])}"
    console.print(
        facts(
            [
                ("compiled with", data["backend"]),
                ("weights", weights),
                ("time", times),
                ("written to", f"{data['output']}, {size(data['file_bytes'])}"),
            ]
        )
    )
