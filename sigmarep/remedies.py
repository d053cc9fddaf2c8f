"""The remedies against unstable training, as the fields of a configuration that make each: arms to compare like with like.

`set_arm` makes a configuration one of them. What an arm does not name stays as the configuration has it: two arms of one
file differ in the remedy alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sigmarep import doors
from sigmarep.errors import BadInput

if TYPE_CHECKING:
    # A report reads the arms, and needs no configurations.
    import ml_collections

PLAIN = {"model.norm": "pre", "model.reparam": "none"}
SIGMA = {"model.norm": "post", "model.reparam": "sigma"}
ARMS: dict[str, dict[str, Any]] = {
    "pre_ln": PLAIN,
    "post_ln": {"model.norm": "post", "model.reparam": "none"},
    "sigma": SIGMA,
    "sigma_pre_ln": {"model.norm": "pre", "model.reparam": "sigma"},
    # γ starts at σ(W₀): the network at the start is the plain one.
    "sigma_start": {"model.norm": "pre", "model.reparam": "sigma", "model.gamma_init": "sigma"},
    # γ, biases and the scales of norms learn at a tenth of the rate: kernels are scale-invariant, these are not.
    "sigma_gains": SIGMA | {"optimizer.scale_parameters_factor": 0.1},
    # And with σ followed by four vectors instead of one, which large steps leave behind.
    "sigma_steady": SIGMA | {"optimizer.scale_parameters_factor": 0.1, "model.power_vectors": 4},
    "pre_ln_gains": PLAIN | {"optimizer.scale_parameters_factor": 0.1},
    # The rate is of no account: kernels start at next to nothing, which Ŵ does not show, outgrow it at any rate, and their
    # moments do not remember it (`optimizer.relative_gradients`).
    "sigma_free": SIGMA | {"model.init_std": 0.01, "optimizer.relative_gradients": True},
    # Without norms: bare, and each reparametrization alone. No norm hides the scale of the kernels.
    "no_norm": {"model.norm": "none", "model.reparam": "none"},
    "weight_only": {"model.norm": "none", "model.reparam": "weight"},
    "spectral_only": {"model.norm": "none", "model.reparam": "spectral"},
    "sigma_only": {"model.norm": "none", "model.reparam": "sigma"},
    # γ has a trust ratio too under LARS and LAMB, where it would move by its raw gradient at the kernels' rate. It has
    # weight decay as well then.
    "sigma_only_trust": {
        "model.norm": "none",
        "model.reparam": "sigma",
        "optimizer.no_decay": ("bias$", "scale$", "alpha$", "shift$", "position", "class_token"),
    },
    "spectral": {"model.norm": "post", "model.reparam": "spectral"},
    "weight": {"model.norm": "pre", "model.reparam": "weight"},
    "wesar": PLAIN | {"model.reparam": "scale"},
    "ngpt": {
        "model.norm": "sphere",
        "model.reparam": "none",
        "model.qk_norm": "unit",
        "optimizer.unit_kernels": True,
    },
    # Scale-invariant kernels without a bound on their spectral norm, in the place of σReparam's.
    "weight_post_ln": {"model.norm": "post", "model.reparam": "weight"},
    "qk_norm": PLAIN | {"model.qk_norm": "layer"},
    "soft_cap": PLAIN | {"model.logit_cap": 10.0},
    "qk_clip": PLAIN | {"optimizer.qk_clip": 10.0},
    "sigmoid": PLAIN | {"model.attention_weights": "sigmoid"},
    "head_temperature": PLAIN | {"model.head_temperature": True},
    "gated": PLAIN | {"model.attention_gate": "elementwise"},
    "target_entropy": PLAIN | {"model.entropy_target": 0.8},
    "seq_vcr": PLAIN | {"model.seq_vcr": 0.1},
    # For models without attention to a context.
    "consensus": PLAIN | {"model.token_mixing": "consensus"},
    "deepnorm": {"model.norm": "deepnorm", "model.reparam": "none"},
    "layer_scale": PLAIN | {"model.branch_scale": "layer_scale"},
    "rezero": PLAIN | {"model.branch_scale": "rezero"},
    "dyt": PLAIN | {"model.norm_type": "dyt"},
    "derf": PLAIN | {"model.norm_type": "derf"},
    "peri_ln": {"model.norm": "peri", "model.reparam": "none"},
    # The small start of `sigma_free` and of deep σReparam, without what goes with it there.
    "small_start": PLAIN | {"model.kernel_init": "normal", "model.init_std": 0.007},
    "sigma_small_start": SIGMA | {"model.init_std": 0.01},
    # Decoupled but under Adam, SGD, LARS and Adagrad.
    "pre_ln_decay": PLAIN | {"optimizer.weight_decay": 0.1},
    # μP's rates for Adam, equal to the plain ones at 64 inputs.
    "mup_rates": PLAIN | {"optimizer.rate_inputs": 64},
    "query_key_rates": PLAIN | {"optimizer.query_key_rates": True},
    "hyperball": PLAIN | {"optimizer.hyperball": True},
    "bounded": PLAIN | {"optimizer.spectral_bound": 0.05},
    "muon": PLAIN | {"optimizer.name": "muon"},
    # The authors' bound for Adam's directions; after Muon, whose directions are smaller, it changes nothing.
    "spectra": PLAIN | {"optimizer.spectral_clip": 10.0},
    "spectral_sphere": PLAIN | {"optimizer.name": "spectral_sphere"},
    "magnitudes": PLAIN | {"optimizer.magnitude_learning_rate": 1e-3},
}
# The arms of the paper's self-supervised comparison; the patch embedding as it was initialised is MoCo v3's remedy.
SELF_SUPERVISED: dict[str, dict[str, Any]] = {
    "pre_ln": PLAIN,
    "frozen_patch": PLAIN | {"freeze_patch_embedding": True},
    "sigma": {"model.norm": "none", "model.reparam": "sigma"},
    "sigma_pre_ln": {"model.norm": "pre", "model.reparam": "sigma"},
}
# Those that the sweeps of configs/stability compare unless they are told otherwise.
SWEPT = ("pre_ln", "sigma", "sigma_free", "qk_norm")
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def set_arm(config: "ml_collections.ConfigDict", name: str) -> None:
    """Makes `config` an arm.

    Args:
      name: one of `ARMS`, or the dotted Python name of a dictionary of fields like theirs, or of a function that is called
        with the configuration and changes it.

    Raises:
      BadInput: there is no such arm, or it has a field that the configuration does not have.
    """
    _set_arm(config, name, ARMS)


def set_self_supervised_arm(config: "ml_collections.ConfigDict", name: str) -> None:
    """Makes `config` the arm `name` of `SELF_SUPERVISED`, or of a dotted Python name as `set_arm` takes it.

    Raises:
      BadInput: see `set_arm`.
    """
    _set_arm(config, name, SELF_SUPERVISED)
    if config.freeze_patch_embedding:
        config.optimizer.no_decay = (*config.optimizer.no_decay, "patch_embedding")


def _set_arm(config: "ml_collections.ConfigDict", name: str, arms: Mapping[str, dict[str, Any]]) -> None:
    if doors.is_dotted(name):
        arm = doors.load(name, field="config argument arm")
    elif name in arms:
        arm = arms[name]
    else:
        raise BadInput(f"config argument arm = {name!r}: expected one of {', '.join(arms)}, or a dotted Python name")
    if callable(arm):
        arm(config)
        return
    if not isinstance(arm, Mapping):
        raise BadInput(f"config argument arm = {name!r}: is a {type(arm).__name__}; expected fields or a function")
    try:
        config.update_from_flattened_dict(arm)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise BadInput(f"config argument arm = {name!r}: does not fit this configuration ({text})") from error
