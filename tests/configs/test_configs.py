"""Every configuration file: loads, refuses a typo, builds its model and schedule, and is what its golden file says.

A golden file holds what a recipe changes in the defaults of its task, and the parameters of its model; see
tests/configs/goldens.py. After an intended change: pytest tests/configs --update-golden, and read the difference.
"""

import functools
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from sigmarep import sweeps, tasks
from sigmarep.errors import BadInput
from sigmarep.training.config import arguments, default_config, validate
from sigmarep.training.mesh import AXES, partition_spec, path_name
from sigmarep.training.optimizers import create_optimizer, hidden_matrices
from sigmarep.training.schedules import create_schedule
from tests.configs import goldens

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parent / "golden"
DEFAULTS = GOLDEN / "defaults.txt"
# Every file with the arguments that stand for its arms.
ARMS = {
    "quickstart.py": [""],
    "image_folder.py": [""],
    "asr/quickstart.py": ["", "reparam=none,norm=pre,disjoint=0"],
    "asr/recordings.py": ["", "language=es"],
    "asr/deep.py": ["", "arm=sigma_one", "arm=plain"],
    "asr/librispeech_100h.py": ["", "reparam=none,optimizer=adagrad", "norm=none,disjoint=2,depth=72,conv=true"],
    "asr/librispeech_960h.py": ["", "norm=pre,optimizer=adagrad"],
    "collapse.py": ["arm=sigma", "arm=pre_ln"],
    "stability/intervention.py": ["", "arm=pre_ln"],
    "stability/vit.py": [
        "",
        *(f"arm={arm}" for arm in ("pre_ln", "qk_norm", "qk_clip", "dyt", "rezero", "bounded", "muon")),
        *(f"arm={arm}" for arm in ("sigmoid", "target_entropy", "seq_vcr", "sigma_start")),
    ],
    "stability/lm.py": ["", "arm=pre_ln", "arm=target_entropy"],
    "stability/remedies.py": ["", "task=lm,arm=hyperball"],
    "stability/translation.py": ["", "arm=pre_ln", "arm=sigmoid"],
    "stability/speech.py": ["", "arm=pre_ln"],
    "stability/robustness.py": ["", "arm=post_ln", "width=192,depth=12,batch_size=2048,dtype=bfloat16"],
    "stability/claim_a.py": [
        "",
        *(f"arm={arm},optimizer=sgd" for arm in ("no_norm", "weight_only", "spectral_only")),
        "arm=sigma_only_trust,width=192,depth=12,patch_size=2,batch_size=512,dtype=bfloat16",
    ],
    "stability/claim_a_speech.py": ["", "arm=no_norm,optimizer=sgd", "arm=sigma_only_trust"],
    "stability/depth.py": [
        "",
        *(f"arm={arm},depth=36" for arm in ("plain", "rezero", "layer_scale", "deepnorm")),
        "arm=deepnorm,width=256,batch_size=8192",
    ],
    "stability/width.py": [
        "",
        *(f"arm={arm},width=32" for arm in ("pre_ln", "post_ln", "qk_norm", "weight_post_ln", "sigma_only")),
        "arm=sigma_pre_ln,width=1024,dtype=bfloat16",
    ],
    "guide/what_to_change.py": [
        "",
        "change=pre_ln",
        "change=gamma_decays",
        "change=no_norm_gamma_sigma_small",
        "change=lm_all",
    ],
    "ssl/quickstart.py": ["", "arm=pre_ln", "arm=frozen_patch", "arm=sigma"],
    "ssl/cifar10.py": ["", "method=moco_v3"],
    "ssl/simclr_imagenet.py": ["arm=pre_ln", "arm=frozen_patch", "arm=sigma,warmup=10", "arm=sigma_pre_ln"],
    "ssl/mocov3_imagenet.py": ["", "arm=sigma_pre_ln,warmup=10"],
    "vit/cifar10.py": [""],
    "vit/fashion_mnist.py": ["", "epochs=20,arm=sigma_pre_ln"],
    "vit/imagenet_384.py": ["", "stage=pretrain"],
    "vit/imagenet_deit.py": ["", "reparam=sigma"],
    "vit/imagenet_mae.py": ["", "variant=L/16", "variant=H/14"],
    "vit/imagenet_robustness.py": [
        "",
        "norm=pre,reparam=none,batch_size=2048,base_learning_rate=0.001,warmup_epochs=0",
    ],
    "lm/quickstart.py": [""],
    "lm/decoder.py": ["", "arm=pre_ln,optimizer=muon", "size=full,arm=pre_ln", "size=full,qk_norm=true"],
    "lm/wikitext103.py": ["", "norm=pre,reparam=none"],
    "mt/deep.py": ["", "arm=sigma_one", "arm=plain"],
    "mt/quickstart.py": [""],
    "mt/wmt17_en_de.py": ["", "depth=100", "depth=18,norm=deepnorm,reparam=none", "depth=50,norm=none"],
    "vit/imagenet_simplified.py": ["", "variant=L/16", "variant=H/16", "reparam=spectral", "reparam=weight,norm=pre"],
}
# The mesh axes of every kernel's last dimensions by the names that this project's models use: what the description of their
# layers must come to without any names.
PLACED = {
    r"(query|key|value)/kernel$": ("fsdp", "tensor", None),
    r"(qkv|qk)/kernel$": ("fsdp", None, "tensor", None),
    r"attention/out/kernel$": ("tensor", None, "fsdp"),
    r"(up|mlp/gate)/kernel$": ("fsdp", "tensor"),
    r"down/kernel$": ("tensor", "fsdp"),
    r"patch_embedding/kernel$": (None, None, None, "fsdp"),
    r"front_end/kernel$": (None, None, "fsdp"),
    r"head/kernel$": ("fsdp", None),
    r"(tables|projections)_\d+/(embedding|kernel)$": ("fsdp", None),
    r"tokens/classes/kernel$": ("fsdp", None),
    r"(projector|predictor)/dense_\d+/kernel$": ("fsdp", "tensor"),
}
CASES = [(name, text) for name, texts in ARMS.items() for text in texts]


def load(name):
    spec = importlib.util.spec_from_file_location("config_under_test", CONFIGS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def resolved(name, text):
    """The validated configuration of an arm and the description of its model's layers."""
    config = validate(load(name).get_config(text))
    model = tasks.get(config.task).create_model(config, tasks.planned_files(config))
    return config, tasks.describe_layers(model)


def golden_path(name):
    return (GOLDEN / name).with_suffix(".txt")


def test_every_file_is_covered():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py")} == set(ARMS)


@pytest.mark.parametrize("name", ARMS)
def test_it_is_what_its_golden_file_says(name, request):
    text = goldens.recipe(name, [(argument, *resolved(name, argument)) for argument in ARMS[name]])
    path = golden_path(name)
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    assert text.splitlines() == path.read_text().splitlines()


def test_no_default_changed(request):
    """A field that the file does not have yet is no difference: a new field with a default changes no recipe."""
    tasks_of = goldens.defaults()
    if request.config.getoption("--update-golden"):
        DEFAULTS.write_text(goldens.format_defaults(tasks_of))
    recorded = goldens.parse_defaults(DEFAULTS.read_text())
    changed = {setting: tasks - tasks_of.get(setting, set()) for setting, tasks in recorded.items()}
    assert not {setting: tasks for setting, tasks in changed.items() if tasks}


def test_every_golden_file_belongs_to_a_recipe():
    assert set(GOLDEN.rglob("*.*")) == {*map(golden_path, ARMS), DEFAULTS}


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_typo_is_refused_where_it_is_written(name, text):
    config = load(name).get_config(text)
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        config.batch_sise = 3
    with pytest.raises(AttributeError, match='Did you mean "reparam"'):
        config.model.reparm = "sigma"


@pytest.mark.parametrize(("name", "text"), CASES)
def test_its_optimizer_can_be_built(name, text):
    config, described = resolved(name, text)
    params = described.variables["params"]
    schedule = create_schedule(config.optimizer, total_steps=1000, warmup_steps=10)
    optimizer = create_optimizer(config.optimizer, schedule=schedule, params=params, layers=described)
    state = jax.eval_shape(optimizer.init, params)
    assert jax.tree.leaves(state)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_its_layers_are_placed_and_trained_by_what_they_are(name, text):
    config, described = resolved(name, text)
    assert described.unknown == ()
    # All dimensions divide over axes of size 1.
    mesh = SimpleNamespace(shape=dict.fromkeys(AXES, 1))
    for path, x in jax.tree_util.tree_leaves_with_path(described.variables):
        axes = next((axes for pattern, axes in PLACED.items() if re.search(pattern, path_name(path))), ())
        spec = tuple(partition_spec(path_name(path), x.shape, mesh, described))
        assert spec == (None,) * (x.ndim - len(axes)) + axes, path_name(path)
    kernels = {name for name in described if name.endswith("kernel")}
    assert set(hidden_matrices(config.optimizer, described)) == {name for name in kernels if "/block" in name}


@pytest.mark.parametrize(("name", "text"), CASES)
def test_its_docstring_has_the_command_and_says_whether_it_was_run(name, text):
    doc = load(name).__doc__
    assert f"python scripts/train.py --config configs/{name}" in doc
    full_scale = name.startswith(("vit/imagenet", "vit/cifar10", "asr/librispeech")) or (
        name.startswith("ssl/") and name != "ssl/quickstart.py"
    )
    if full_scale:
        assert "Not run" in doc


SWEEPS = [name for name in ARMS if hasattr(load(name), "sweep")]
# Rows of the paper's experiments that are sweeps, and what this project compares by one.
SWEPT = {
    "guide/what_to_change.py",
    "asr/librispeech_100h.py",
    "asr/librispeech_960h.py",
    "asr/deep.py",
    "collapse.py",
    "lm/decoder.py",
    "mt/deep.py",
    "mt/wmt17_en_de.py",
    "ssl/mocov3_imagenet.py",
    "ssl/quickstart.py",
    "ssl/simclr_imagenet.py",
    "stability/claim_a.py",
    "stability/claim_a_speech.py",
    "stability/depth.py",
    "stability/intervention.py",
    "stability/lm.py",
    "stability/remedies.py",
    "stability/robustness.py",
    "stability/speech.py",
    "stability/translation.py",
    "stability/vit.py",
    "stability/width.py",
    "vit/imagenet_deit.py",
    "vit/imagenet_mae.py",
    "vit/imagenet_robustness.py",
    "vit/imagenet_simplified.py",
}


def test_experiments_that_are_sweeps_have_one():
    assert set(SWEEPS) == SWEPT


def all_forms(module):
    """The points of a sweep, of every size or task where it takes one."""
    if not inspect.signature(module.sweep).parameters:
        return [module.sweep()]
    name = "size" if hasattr(module, "SIZES") else "task"
    return [module.sweep(f"{name}={each}") for each in getattr(module, f"{name.upper()}S")]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_of_a_sweep_can_be_built(name, tmp_path):
    module, models = load(name), set()
    forms = [sweeps.runs(str(CONFIGS / name), points, str(tmp_path), "train.py") for points in all_forms(module)]
    assert all(len({run.name for run in runs}) == len(runs) > 1 for runs in forms)
    runs = [run for each in forms for run in each]
    for run in runs:
        (path,) = (each for each in run.command if each.startswith(str(CONFIGS)))
        config = module.get_config(path.partition(":")[2])
        config.update_from_flattened_dict(
            {key.removeprefix("config."): value for key, value in run.point.items() if key.startswith("config.")}
        )
        config = validate(config)
        create_schedule(config.optimizer, total_steps=1000, warmup_steps=10)
        # Seeds and rates do not change the model, which takes a second to describe.
        model = (str(config.model), config.get("method"), config.get("freeze_patch_embedding"))
        if model not in models:
            models.add(model)
            tasks.get(config.task).create_model(config, tasks.planned_files(config))


def test_a_sweep_is_given_what_stands_behind_its_files_colon(tmp_path):
    script = CONFIGS.parent / "scripts" / "sweep.py"
    flags = ["--workdir", str(tmp_path), "--dry_run"]
    for text, widths in (("", {32, 64, 128}), (":size=gpu", {32, 64, 128, 256, 512, 1024})):
        given = ["--config", f"{CONFIGS}/stability/width.py{text}", *flags]
        lines = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, check=True).stdout
        assert {int(width) for width in re.findall(r"width\.py:width=(\d+),", lines)} == widths
    given = ["--config", f"{CONFIGS}/stability/vit.py:size=gpu", *flags]
    refused = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "its sweep() takes no argument; leave out 'size=gpu'" in refused.stderr


@pytest.mark.parametrize("base_learning_rate", [5e-4, 1e-3])
@pytest.mark.parametrize("batch_size", [1024, 2048])
def test_the_grid_of_the_paper_scales_its_rate_with_the_batch(base_learning_rate, batch_size):
    text = f"base_learning_rate={base_learning_rate},batch_size={batch_size}"
    for name in ("vit/imagenet_robustness.py", "vit/imagenet_deit.py"):
        config = load(name).get_config(text)
        assert config.optimizer.learning_rate == pytest.approx(base_learning_rate * batch_size / 512)


@pytest.mark.parametrize("name", [name for name, texts in ARMS.items() if name != "quickstart.py"])
def test_unknown_arguments_are_refused(name):
    with pytest.raises(BadInput, match="config argument 'colour=red': expected name=value with one of"):
        load(name).get_config("colour=red")


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith("ssl/")])
def test_an_unknown_arm_lists_the_four(name):
    with pytest.raises(BadInput, match="arm = 'post_ln': expected one of pre_ln, frozen_patch, sigma, sigma_pre_ln"):
        load(name).get_config("arm=post_ln")


def test_arguments_keep_the_types_of_their_defaults():
    found = arguments("a=3,b=0.5,c=true", a=1, b=1.0, c=False, d="x")
    assert found == {"a": 3, "b": 0.5, "c": True, "d": "x"}
    with pytest.raises(BadInput, match="'a=many': expected a value of type int"):
        arguments("a=many", a=1)


def changed(**fields):
    config = default_config("image_classification").unlock()
    for name, value in fields.items():
        *blocks, leaf = name.split("__")
        block = config
        for each in blocks:
            block = block[each]
        with block.ignore_type():
            block[leaf] = value
    return config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer__learning_rat": 1.0},
            r"config\.optimizer\.learning_rat: .*did you mean config\.optimizer\.learning_rate",
        ),
        ({"nrom": "pre"}, r"config\.nrom: there is no such field; did you mean config\.model\.norm"),
        ({"batch_size": "8"}, r"config\.batch_size = '8': expected a whole number of at least 1"),
        ({"batch_size": 0}, r"config\.batch_size = 0: expected a whole number of at least 1"),
        ({"optimizer__learning_rate": float("nan")}, r"config\.optimizer\.learning_rate = nan"),
        ({"model__scan": 1}, r"config\.model\.scan = 1: expected True or False"),
        ({"batch_size": True}, r"config\.batch_size = True: expected a whole number"),
        ({"compute_dtype": "float16"}, r"config\.compute_dtype = 'float16': expected one of float32, bfloat16"),
        ({"task": "images"}, r"config\.task = 'images': expected one of image_classification"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(BadInput, match=message):
        validate(changed(**fields))


def test_a_missing_field_is_named():
    config = changed()
    del config["seed"]
    with pytest.raises(BadInput, match=r"config\.seed: is missing"):
        validate(config)
