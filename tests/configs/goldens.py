"""Golden texts of the recipes: what each changes in its task's defaults, and the parameters of its model.

A recipe's text has one section an arm. The first is complete:

    configs/stability/vit.py: image_classification
    batch_size = 100
    encoder/blocks/mlp/up/kernel 12×64×128 reparametrized decayed

that is, the fields that differ from the task's default, then the parameters with their shapes, whether they are
reparametrized and whether they are decayed. Every other section has the lines that the first has and the arm has not
(-), and the reverse (+).
"""

import json

import jax

from sigmarep.configuration import flatten
from sigmarep.tasks import TASKS
from sigmarep.training.config import default_config
from sigmarep.training.mesh import path_name
from sigmarep.training.optimizers import decay_mask

EVERY = "every task"


def recipe(name, arms):
    """The text of `configs/<name>`; `arms` has its (argument, configuration, description of its layers)."""
    sections, first = [], None
    for argument, config, layers in arms:
        title = f"configs/{name}{':' * bool(argument)}{argument}: {config.task}"
        lines = description(config, layers)
        sections.append([title, *(lines if first is None else _differences(first, lines))])
        first = lines if first is None else first
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def description(config, layers):
    """One line for each field that differs from the task's default, then one for each parameter."""
    changed = _settings(config) - _settings(default_config(config.task))
    return sorted(changed) + _parameters(config, layers)


def defaults():
    """The settings that are a default, as they are written in a recipe's text, each with the tasks whose default it is."""
    tasks_of = {}
    for task in TASKS:
        for setting in _settings(default_config(task)):
            tasks_of.setdefault(setting, set()).add(task)
    return tasks_of


def format_defaults(tasks_of):
    """`defaults` as text, one line a setting."""
    owners = {each: EVERY if tasks == set(TASKS) else ", ".join(sorted(tasks)) for each, tasks in tasks_of.items()}
    return "".join(f"{setting}  # {owners[setting]}\n" for setting in sorted(owners))


def parse_defaults(text):
    """The reverse of `format_defaults`."""
    pairs = [line.split("  # ") for line in text.splitlines()]
    return {setting: set(TASKS if owners == EVERY else owners.split(", ")) for setting, owners in pairs}


def _settings(config):
    # As JSON a list is equal to a tuple of the same elements, as it is for the trainer.
    return {f"{name} = {json.dumps(value)}" for name, value in flatten(config).items()}


def _parameters(config, layers):
    params = layers.variables["params"]
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    lines = []
    for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params, config.optimizer.no_decay)):
        name = path_name(path)
        reparametrized = name in layers and layers[name].reparam != "none"
        words = [name, "×".join(map(str, shapes[name])) or "scalar"]
        lines.append(" ".join(words + ["reparametrized"] * reparametrized + ["decayed"] * bool(decayed)))
    return sorted(lines)


def _differences(lines, others):
    signed = [("-", line) for line in lines if line not in others] + [
        ("+", line) for line in others if line not in lines
    ]

    def position(item):
        sign, line = item
        return " = " not in line, line.split()[0], sign == "+"

    return [sign + line for sign, line in sorted(signed, key=position)]
