import click

import refitkit
from refitkit.cli.api import main


@click.command("hello", short_help="Greet somebody.")
@click.argument("who")
def hello(who):
    """Greet WHO."""
    print("hello", who)


class Greeting:
    """Adds a command. Users type "refitkit hello WHO"; tests call main."""

    name = "greeting"

    @refitkit.hookimpl
    def refitkit_register_commands(self, cli):
        cli.add_command(hello)


main(["hello", "you"], plugins=[Greeting()])
# hello you
