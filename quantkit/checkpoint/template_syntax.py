"""Chat templates that no program could render, because they aren't valid Jinja."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.base.errors import InputError


def check_syntax(templates: Mapping[str, str]) -> None:
    """Raise InputError for a chat template that isn't valid Jinja.

    templates: the text of each, by where it is: a path, perhaps with a key.
    """
    if not templates:
        return
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tag with which transformers marks what the model itself has said."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(extensions=[Generation, loopcontrols], autoescape=False)
    for where, text in templates.items():
        try:
            environment.parse(text)
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template isn't valid Jinja: {error.message}, in its line {error.lineno}",
                where=where,
                fix="Repair it, or remove it: then the model is one without a chat template.",
            ) from error
