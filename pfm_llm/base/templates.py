"""Jinja templates that lie beside the modules that fill them."""

import importlib.resources

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, *, is_html: bool, **values: object) -> str:
    """A template with values in its places; a place without a value is an error.

    Args:
        package: The package that holds the template, such as ``pfm_llm.publish``.
        template: The template's file name.
        is_html: Whether markup in values is escaped.
        values: The values by name.
    """
    source = importlib.resources.files(package).joinpath(template).read_text("utf-8")
    return _environment(is_html).from_string(source).render(values)


def pages(package: str) -> Environment:
    """The HTML templates in the folder ``templates`` of a package; they may extend each other."""
    environment = _environment(is_html=True)
    environment.loader = PackageLoader(package)
    return environment


def _environment(is_html: bool) -> Environment:
    environment = Environment(
        autoescape=is_html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["repr"] = repr
    return environment
