"""``refitkit compile``: compile a program and save the refittable module."""

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


@click.command("compile", short_help="Compile a program into a refittable module.")
@file_argument("program")
@file_option("-o", "--output", required=True, help="Write the compiled module to this file.")
@click.option(
    "--backend",
    metavar="NAME",
    default="aotinductor",
    show_default=True,
    help="Backend that compiles the program.",
)
@click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=as_options,
    help="Set an option of the backend; VALUE is JSON or text. Can be repeated.",
)
@click.option(
    "--prove/--no-prove",
    default=True,
    show_default=True,
    help="Refit the module to other weights and back, to prove that refits work.",
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
    """Compile PROGRAM, a file written by torch.export.save, into a refittable module.

    Loading a program can run code that is in the file: use only files that you trust.
    """
    from refitkit.cli.files import bytes_of, check_module_folder, check_output, load_program

    # Compiling can take minutes, so a path that cannot be written is refused first.
    check_output(output, program, folders=True)
    pipeline = session.pipeline()
    check_module_folder(pipeline, output)
    pipeline.backend(backend)  # an unknown name raises before the program is loaded
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
            if done.verb != "refit"  # refits of the proof are part of the stage "prove"
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
