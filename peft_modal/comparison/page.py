"""The table as one HTML page that needs nothing else."""

from __future__ import annotations

from typing import Any, Final

import jinja2
from markupsafe import Markup

from peft_modal.comparison.choose import Choice
from peft_modal.comparison.manifest import Manifest
from peft_modal.comparison.plan import Plan
from peft_modal.comparison.table import Style, caption, cells, headings, rows

_TEMPLATE: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1b2733; --faint: #5d6b78; --line: #dfe4e9; --accent: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 48rem; }
.faint { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); border-bottom-color: var(--faint); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
td.best { font-weight: 700; color: var(--accent); }
figure { margin: 1rem 0 0; max-width: 48rem; }
figure svg { width: 100%; min-width: 32rem; height: auto; display: block; }
pre { background: #f4f6f8; padding: .75rem 1rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: .85rem; }
li { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="faint">{{ subtitle }}</p>
{% if failed %}
<h2>Failed</h2>
<ul>{% for line in failed %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
<h2>Results</h2>
<div class="scroll"><table>
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in table %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="faint">{{ caption }}</p>
<figure class="scroll" role="img" aria-label="{{ metric }} over trained parameters">{{ plot }}</figure>
{% if grid %}
<h2>Learning rates</h2>
<p>{{ metric_val }} of seed {{ seed }} by learning rate; the chosen one is marked.</p>
<div class="scroll"><table>
<tr><th>method</th>{% for lr in lrs %}<th>{{ lr }}</th>{% endfor %}</tr>
{% for name, values in grid %}
<tr><td>{{ name }}</td>{% for value, chosen in values %}<td{% if chosen %} class="best"{% endif %}>{{ value }}</td>\
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
<h2>How it was made</h2>
<pre>{{ command }}</pre>
<p class="faint">{{ made_with }}</p>
</body>
</html>
"""


def page(manifest: Manifest, plot: str) -> str:
    """The page.

    Args:
        manifest: The comparison.
        plot: Its plot as SVG.
    """
    plan, progress = manifest.plan, manifest.progress
    table = rows(plan, progress)
    style = Style.of(plan, table)
    choices = {label: plan.choice(label, progress) for label in plan.methods}
    finished = [one for one in progress.values() if one.state == "done"]
    made = sorted({_versions(one.versions) for one in finished if one.versions})
    hours = sum(one.seconds or 0 for one in finished) / 3600
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    values: dict[str, Any] = {
        "title": f"{len(plan.methods)} methods compared",
        "subtitle": f"{plan.config['backbone']['name']}, {plan.config['data']['name']}, {plan.config['task']['name']}; "
        f"{len(finished)} of {plan.size} runs finished, {hours:.1f} hours of work",
        "headings": headings(style, plan, table),
        "table": [cells(row, style, plan, table) for row in table],
        "caption": " ".join(caption(plan, table, choices)),
        "failed": [f"{row.method}, {problem}" for row in table for problem in row.problems],
        "metric": plan.metric,
        "metric_val": f"val/{plan.metric}{' in percent' if style.percent else ''}",
        "seed": plan.seeds[0],
        "lrs": [f"{lr:g}" for lr in plan.lrs],
        "grid": _grid(plan, style, choices) if len(plan.lrs) > 1 else [],
        "command": manifest.command,
        "made_with": "; ".join(made),
        # From the first tag on: an XML declaration has no place inside a page.
        "plot": Markup(plot[plot.index("<svg") :]),  # noqa: S704 — our own drawing
    }
    return environment.from_string(_TEMPLATE).render(values)


def _grid(plan: Plan, style: Style, choices: dict[str, Choice | None]) -> list[tuple[str, list[tuple[str, bool]]]]:
    return [
        (label, [(style.value(choice.values.get(lr)) or "failed", lr == choice.lr) for lr in plan.lrs])
        for label, choice in choices.items()
        if choice is not None
    ]


def _versions(versions: Any) -> str:  # noqa: ANN401 — as the manifest holds it
    return ", ".join(f"{name} {version}" for name, version in versions.items())
