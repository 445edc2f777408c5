"""Writes the report section on how the results were made."""

from clip_jax.evaluation.figures import Html, escaped
from clip_jax.evaluation.provenance import Provenance
from clip_jax.evaluation.report.page import join


def provenance_section(provenance: Provenance | None) -> Html:
    """Returns a list of facts, and the config in a fold; empty for None."""
    if provenance is None:
        return Html("")
    facts = {name: escaped(value) for name, value in provenance.facts().items()}
    facts["Command"] = Html(f"<code>{facts['Command']}</code>")
    entries = "".join(f"<dt>{escaped(name)}</dt><dd>{value}</dd>" for name, value in facts.items())
    config = f"<details><summary>Config</summary><pre>{escaped(provenance.config)}</pre></details>"
    return join("<h2>How this was made</h2>", f"<dl>{entries}</dl>", config if provenance.config else "")
