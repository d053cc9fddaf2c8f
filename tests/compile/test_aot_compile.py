"""Steps compiled from shapes alone, and what their programs do."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep import tasks
from sigmarep.compile import aot_compile, hlo_cost
from sigmarep.errors import BadInput
from sigmarep.training import mesh as meshes
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build, build_program


def small(task="image_classification", **mesh):
    config = default_config(task)
    config.total_steps, config.batch_size = 10, 16
    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 2, 64, 4, 256
    config.mesh.update(mesh)
    return config


@functools.cache
def gathered(data, fsdp, tensor, reparam, power_vectors=1, qkv="fused"):
    """Shapes that all-gathers make in a step on eight devices, but for vectors: the smallest part of a kernel that could
    be one has 32 x 64 elements, and four vectors of the power iteration have at most 4 x 256."""
    config = small(data=data, fsdp=fsdp, tensor=tensor)
    model = config.model
    model.reparam, model.norm, model.power_vectors, model.qkv, model.scan = reparam, "none", power_vectors, qkv, False
    config.optimizer.name = "sgd"
    experiment = build_program(validate(config))
    lowered = experiment.runner.lower(experiment.abstract_state, experiment.task.abstract_batches()[-1], panel=False)
    shapes = hlo_cost.shapes_of(lowered.compile().as_text(), "all-gather")
    return sorted(shape for shape in shapes if math.prod(shape) >= 32 * 64)


@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2), (2, 1, 4)])
@pytest.mark.parametrize("options", [{}, {"power_vectors": 4}, {"qkv": "separate"}])
def test_no_kernel_is_gathered_for_sigma(mesh, options):
    assert gathered(*mesh, "sigma", **options) == gathered(*mesh, "none", qkv=options.get("qkv", "fused"))


@pytest.mark.parametrize("panel", [False, True])
def test_a_step_with_four_power_vectors_calls_no_lapack(panel):
    config = small(data=8)
    config.model.power_vectors = 4
    experiment = build_program(validate(config))
    batch = experiment.task.abstract_batches()[-1]
    text = experiment.runner.lower(experiment.abstract_state, batch, panel=panel).as_text()
    # The only calls are those that place arrays on the mesh.
    assert {name for name in re.findall(r"custom_call @(\w+)", text) if name != "Sharding"} == set()


def whole_batches(rules, monkeypatch, **mesh):
    """Arrays in a step on eight devices that hold every token of the whole batch: 16 pictures of 65 tokens."""
    monkeypatch.setattr(meshes, "ACTIVATION_RULES", rules)
    config = small(**mesh)
    config.data.image_size = 16
    experiment = build_program(validate(config))
    lowered = experiment.runner.lower(experiment.abstract_state, experiment.task.abstract_batches()[-1], panel=False)
    return re.findall(r"f32\[(?:16,65|1040),\d[\d,]*\]", lowered.compile().as_text())


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_no_device_computes_the_whole_batch(mesh, monkeypatch):
    assert whole_batches(meshes.ACTIVATION_RULES, monkeypatch, data=1, **mesh) == []
    # Left to itself the partitioner follows the kernels.
    assert whole_batches((), monkeypatch, data=1, **mesh)


def test_a_loop_body_is_counted_once_per_iteration():
    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def looped(x, w):
        def inner(x, _):
            return x @ w, None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0] + 1.0, None

        return jax.lax.scan(outer, x @ w, None, length=5)[0]

    compiled = jax.jit(looped).lower(matrix, matrix).compile()
    found = hlo_cost.costs(compiled.as_text(), compiled.cost_analysis())
    assert sorted(found.trip_counts.values()) == [5, 15]
    np.testing.assert_allclose(found.flops, (1 + 15) * 2 * 64**3, rtol=0.02)
    assert found.flops > 5 * found.without_loops[0]


def test_collectives_in_a_loop_are_counted_once_per_iteration():
    text = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,4]{1,0} all-reduce(%x), to_apply=%add
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i.1, %y)
}

ENTRY %main (p: (s32[], f32[8,4])) -> bf16[16,4] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %loop = (s32[], /*index=1*/f32[8,4]{1,0}) while(%p), condition=%condition, body=%body
  %z = bf16[8,4]{1,0} constant({...})
  %start = (bf16[8,4]{1,0}, bf16[16,4]{1,0:T(8,128)}) all-gather-start(%z), dimensions={0}
  ROOT %done = bf16[16,4]{1,0} all-gather-done(%start)
}
"""
    assert hlo_cost.collectives(text) == [
        hlo_cost.Collective("all-reduce", 12, 12 * 8 * 4 * 4),
        hlo_cost.Collective("all-gather", 1, 16 * 4 * 2),
    ]


def test_an_unrolled_loop_has_fewer_iterations():
    text = """HloModule step

%condition (state.1: (u32[], bf16[8,4])) -> pred[] {
  %state.1 = (u32[], bf16[8,4]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  %n = u32[]{:T(128)} constant(9)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (state: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %state = (u32[], bf16[8,4]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state), index=0
  %two = u32[]{:T(128)} constant(2)
  %i.2 = u32[]{:T(128)} add(%i.1, %two)
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %start = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %y = bf16[8,4]{1,0} collective-permute-done(%start)
  ROOT %next = (u32[], bf16[8,4]{1,0}) tuple(%i.2, %y)
}

ENTRY %main (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %loop = (u32[], bf16[8,4]{1,0}) while(%p), condition=%condition, body=%body
}
"""
    # 0, 2, 4, 6 and 8 are below 9.
    assert hlo_cost.collectives(text) == [hlo_cost.Collective("collective-permute", 5, 5 * 8 * 4 * 2)]


PAGE = "One line of text, and another.\nA second paragraph of it.\n" * 20
PAIRS = "a sentence\tein Satz\nanother one\tnoch einer\n" * 20


def with_data(task, folder):
    """A small configuration of a task whose data need no package."""
    config = small(task)
    config.data.data_dir = str(folder)
    if task in ("language_modeling", "translation"):
        name, text = ("train.txt", PAGE) if task == "language_modeling" else ("train.tsv", PAIRS)
        (folder / name).write_text(text)
        config.data.name, config.data.folder = "text_folder", str(folder)
        config.data.vocabulary.kind = "byte"
    if task == "language_modeling":
        config.data.sequence_length = 32
    if task == "translation":
        config.batch_size, config.data.buckets = 512, (32,)
        config.data.max_source_length = config.data.max_target_length = 32
        config.data.source_feature, config.data.target_feature = "source", "target"
    return config


# How many labels a batch of speech has only its transcripts say: see tests/tasks/test_speech_task.py.
@pytest.mark.parametrize("task", [task for task in tasks.TASKS if task != "speech_recognition"])
def test_a_program_without_data_has_the_shapes_of_the_real_one(task, tmp_path):
    config = with_data(task, tmp_path)
    abstract = build_program(validate(config))
    real = build(validate(config))
    batch = next(real.data.train_stream(start=0, process_index=0, process_count=1))
    found = [{name: (x.shape, x.dtype) for name, x in each.items()} for each in abstract.task.abstract_batches()]
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} in found
    assert [{name: (x.shape, x.dtype) for name, x in each.items()} for each in real.task.abstract_batches()] == found
    assert abstract.task.batch_rows() == real.task.batch_rows()
    same = jax.tree.map(
        lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract.abstract_state, real.abstract_state
    )
    assert all(jax.tree.leaves(same))


def test_a_program_that_cannot_be_printed_has_no_text():
    class Newer:
        """Stands in for a program of a newer libtpu, whose instructions this jaxlib does not know."""

        def as_text(self):
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands"
            )

    assert aot_compile.program_text(Newer()) is None
    assert "HloModule" in aot_compile.program_text(jax.jit(jnp.sin).lower(1.0).compile())


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_step_is_compiled_for_the_devices_present(parallel):
    config = small()
    config.parallel = parallel
    target = aot_compile.target("local")
    found = aot_compile.compile_step(config, target)
    assert found.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    assert found.batch["image"] == (16, 8, 8, 1)
    assert 0 < found.memory.total < target.memory
    assert found.costs.flops > 1e6
    assert [each.kind for each in found.collectives] == ["all-reduce"]
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(build_program(validate(config)).abstract_state.params))
    assert found.collectives[0].bytes >= 4 * parameters


def test_what_does_not_fit_says_what_to_change():
    target = aot_compile.target("local")._replace(memory=300_000)
    config = small()
    with pytest.raises(aot_compile.DoesNotFit, match=r"GiB per device but .*; increase config\.mesh\.fsdp from 1 to 2"):
        aot_compile.compile_step(config, target)
    config.mesh.fsdp = 8
    with pytest.raises(aot_compile.DoesNotFit, match=r"set config\.model\.remat = 'full'"):
        aot_compile.compile_step(config, target)
    config.model.remat = "full"
    with pytest.raises(
        aot_compile.DoesNotFit, match=r"double config\.accumulation \(1\), or increase config\.mesh\.tensor"
    ):
        aot_compile.compile_step(config, target)


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "pod", ""])
def test_an_unknown_topology_lists_those_that_there_are(name):
    with pytest.raises(BadInput, match=r"expected local or one of v4:\{2x2x1,.*v5e:\{2x2,"):
        aot_compile.target(name)
