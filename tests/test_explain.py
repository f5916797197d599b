"""What `train.explain` says of a train op, from shapes alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss

SHAPES = {
    "embed": {"table": jax.ShapeDtypeStruct((1000, 16), np.float32)},
    "dense": {"bias": jax.ShapeDtypeStruct((16,), jnp.bfloat16), "kernel": jax.ShapeDtypeStruct((16, 16), np.float32)},
}


def build(optimizer: Any = "Adam", learning_rate: Any = 0.1, **settings: Any) -> optloss.TrainOp:
    return optloss.optimize_loss(lambda params: 0.0, 0, learning_rate, optimizer, **settings)


def rows_of(train: optloss.TrainOp, params: Any = None) -> dict[str, dict[str, Any]]:
    explained = train.explain(SHAPES if params is None else params).to_dict()
    return {row["name"]: row for row in explained["parameters"]}


def warnings_of(params: Any = None, **settings: Any) -> tuple[str, ...]:
    return build(**settings).explain(SHAPES if params is None else params).warnings


def test_explain_has_the_stages_in_the_order_in_which_they_run() -> None:
    train = optloss.optimize_loss(
        lambda params: 0.0,
        0,
        0.1,
        "Adam",
        gradient_noise_scale=0.01,
        gradient_multipliers={"embed/*": 0.1, "dense/bias": 2.0},
        clip_gradients=optloss.adaptive_clipping_fn(),
        learning_rate_decay_fn=lambda rate, step: optloss.exponential_decay(rate, step, 1000, 0.96),
        axis_name="batch",
        name="d",
    )
    explained = train.explain(SHAPES)
    assert explained.name == "d"
    assert explained.pipeline == (
        "grad -> mean over 'batch' -> noise 0.01 -> multipliers (2) -> adaptive clip -> "
        "Adam, rate 0.1 by exponential_decay -> skip unless finite -> apply -> step + 1"
    )


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"optimizer": "SGD"}, "SGD, rate 0.1"),
        ({"optimizer": "lion"}, "lion, rate 0.1"),
        ({"optimizer": optloss.sgd}, "SGD, rate 0.1"),
        ({"optimizer": optax.adamw}, "adamw, rate 0.1"),
        ({"optimizer": optax.adamw(0.3)}, "chain"),
        ({"optimizer": optax.lbfgs, "learning_rate": None}, "lbfgs"),
        ({"clip_gradients": 2.5}, "clip to norm 2.5 -> Adam, rate 0.1"),
        ({"clip_gradients": optax.clip(1.0)}, "clip by clip -> Adam, rate 0.1"),
        ({"clip_gradients": lambda pairs: pairs}, "clip by a function -> Adam, rate 0.1"),
        ({"gradient_noise_scale": lambda step: 0.1 / step, "key": 0}, "noise by a function -> Adam, rate 0.1"),
        ({"learning_rate_decay_fn": optloss.from_schedule(lambda step: 0.5)}, "Adam, rate 0.1 by from_schedule"),
    ],
)
def test_explain_names_what_it_is_given(settings: dict[str, Any], stages: str) -> None:
    assert build(**settings).explain(SHAPES).pipeline == f"grad -> {stages} -> skip unless finite -> apply -> step + 1"


def test_explain_says_what_happens_to_the_step_and_to_bad_steps() -> None:
    ends = build(nonfinite="apply", increment_global_step=False).explain(SHAPES).pipeline
    assert ends == "grad -> Adam, rate 0.1 -> apply -> step as it is"
    assert optloss.optimize_loss(lambda w: 0.0, None, 0.1, "SGD").explain(SHAPES).pipeline.endswith("-> apply")


def test_explain_gives_each_parameter_what_it_gets() -> None:
    """Adam has two slots: of 256 float32 numbers they take 2048 bytes; those of bfloat16 parameters are float32."""
    rows = rows_of(
        build(
            gradient_noise_scale=0.5, gradient_multipliers={"dense/*": 0.25, "dense/bias": jnp.ones(16)},
            variables="dense/*",
        )
    )  # fmt: skip
    assert rows == {
        "dense/bias": {
            "name": "dense/bias", "shape": [16], "dtype": "bfloat16", "trained": True, "key": "dense/bias",
            "multiplier": "array (16,)", "noise": 0.5, "slot_bytes": 128,
        },
        "dense/kernel": {
            "name": "dense/kernel", "shape": [16, 16], "dtype": "float32", "trained": True, "key": "dense/*",
            "multiplier": 0.25, "noise": 0.5, "slot_bytes": 2048,
        },
        "embed/table": {
            "name": "embed/table", "shape": [1000, 16], "dtype": "float32", "trained": False, "key": None,
            "multiplier": None, "noise": None, "slot_bytes": 0,
        },
    }  # fmt: skip


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Momentum", "Ftrl", "adamw", "adafactor", optax.lbfgs(0.1)])
def test_explain_counts_the_bytes_that_the_state_has(optimizer: Any) -> None:
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), SHAPES)
    train = build(optimizer, clip_gradients=optloss.adaptive_clipping_fn(global_step=True))
    totals = train.explain(params).totals
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(train.init(params).opt_states))
    assert totals["slot_bytes"] + totals["other_state_bytes"] == held
    assert (totals["slot_bytes"] > 0) == (optimizer != "SGD")
    assert totals["numbers"] == 1000 * 16 + 16 + 16 * 16
    assert totals["bytes"] == 4 * 1000 * 16 + 2 * 16 + 4 * 16 * 16


def test_explain_gives_a_slot_to_the_longest_path_that_it_ends_in() -> None:
    """Momentum's slot of a/b ends in the path of b, too."""
    rows = rows_of(build("Momentum"), {"b": np.ones(2, np.float32), "a": {"b": np.ones(3, np.float32)}})
    assert {name: row["slot_bytes"] for name, row in rows.items()} == {"a/b": 12, "b": 8}


@pytest.mark.parametrize("optimizer", ["Adam", "Momentum"])
def test_explain_of_a_bare_array_counts_its_slots(optimizer: str) -> None:
    assert (
        rows_of(build(optimizer), np.ones(3, np.float32))["params"]["slot_bytes"]
        == {"Adam": 24, "Momentum": 12}[optimizer]
    )


def test_explain_takes_a_state_shapes_and_arrays_alike() -> None:
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), SHAPES)
    train = build()
    assert train.explain(params) == train.explain(SHAPES) == train.explain(train.init(params))


def test_a_transformation_explains_itself_as_its_train_op_does() -> None:
    """But for the loss, which it does not report."""
    alone = optloss.transformation(0, 0.1, "Adam", clip_gradients=1.0).explain(SHAPES)
    whole = build(clip_gradients=1.0).explain(SHAPES)
    assert alone == whole._replace(summaries=("learning_rate", "global_gradient_norm"))


def test_explain_needs_no_device_for_parameters_that_none_could_hold() -> None:
    """1e15 numbers of four bytes, with noise for which no key is given."""
    explained = build(gradient_noise_scale=0.01).explain({"w": jax.ShapeDtypeStruct((10**8, 10**7), np.float32)})
    assert explained.totals["slot_bytes"] == 8 * 10**15
    assert "8000.0 TB" in repr(explained)


def test_explain_raises_what_init_would_raise() -> None:
    with pytest.raises(ValueError, match=r"gradient_multipliers: no parameter is named 'embed/tabel'. Did you mean"):
        build(gradient_multipliers={"embed/tabel": 0.1}).explain(SHAPES)
    with pytest.raises(ValueError, match=r"variables: no parameter matches 'decoder/\*'"):
        build(variables="decoder/*").explain(SHAPES)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"gradient_multipliers": {"embed/*": 0.1}}, "gradient_multipliers: Adam divides a constant factor out again"),
        ({"optimizer": optax.adamw, "gradient_multipliers": {"**": 3}}, "gradient_multipliers: adamw divides"),
        (
            {"optimizer": "SGD", "gradient_multipliers": {"embed/*": 0.1}, "variables": "dense/*"},
            "gradient_multipliers: 'embed/*' matches nothing that is trained.",
        ),
        (
            {"clip_gradients": optloss.adaptive_clipping_fn(std_factor=5)},
            "clip_gradients: std_factor=5 is beyond sqrt(decay / (1 - decay)) = 4.36, where it never clips.",
        ),
        (
            {"clip_gradients": optloss.adaptive_clipping_fn(std_factor=5, static_max_norm=1)},
            "clip_gradients: std_factor=5 is beyond sqrt(decay / (1 - decay)) = 4.36, where it never clips but to",
        ),
        ({"clip_gradients": math.inf}, "clip_gradients: a limit of infinity never clips"),
        ({"clip_gradients": 0}, "clip_gradients: a limit of 0 makes every gradient 0"),
        ({"key": 3}, "key: there is no noise"),
        ({"optimizer": optax.sgd(0.3)}, "learning_rate: 0.1 does not reach the optimizer"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 trains nothing"),
        (
            {"optimizer": optax.sgd(0.3), "learning_rate": None, "learning_rate_decay_fn": lambda rate, step: rate},
            "learning_rate_decay_fn: it is not called",
        ),
        ({"summaries": ["loss", "learning_rate"]}, "summaries: 'learning_rate' is reported with a"),
    ],
)
def test_explain_warns_of_a_setting_that_cannot_do_what_it_says(settings: dict[str, Any], warning: str) -> None:
    (found,) = warnings_of(**settings)
    assert found.startswith(warning)
    assert f"warning: {found}".split() == repr(build(**settings).explain(SHAPES)).split()[-1 - len(found.split()) :]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "SGD", "gradient_multipliers": {"embed/*": 0.1}},
        {"gradient_multipliers": {"embed/*": lambda step: 1.0 / (step + 1)}},  # no constant
        {"gradient_multipliers": {"embed/*": 0.0}},  # that stops them, under Adam too
        {"clip_gradients": optloss.adaptive_clipping_fn(std_factor=4.3)},
        {"gradient_noise_scale": 0.1, "key": 3},
        {"summaries": ["learning_rate"], "learning_rate_decay_fn": lambda rate, step: rate},
    ],
)
def test_explain_warns_of_nothing_that_does_what_it_says(settings: dict[str, Any]) -> None:
    assert warnings_of(**settings) == ()


def change(optimizer: Any, factor: float) -> Any:
    """How far a parameter of 1.5 comes in twenty steps along gradients times a factor."""
    draw = np.random.default_rng(0)
    gradients = (1000 * factor * draw.normal(size=(20, 40))).astype(np.float32)
    start = {"w": jnp.full(40, 1.5)}
    stage = optloss.transformation(0, 0.01, optimizer)

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = stage.update({"w": gradient}, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.asarray(gradients)))(
        (start, stage.init(start))
    )
    return params["w"] - start["w"]


NAMES = [*optloss.OPTIMIZER_CLS_NAMES, "adadelta", "adamw", "lamb", "lion", "radam", "sign_sgd", "sm3", "yogi"]


@pytest.mark.parametrize("name", NAMES)
def test_explain_warns_of_multipliers_where_a_tenth_of_the_gradient_makes_the_same_step(name: str) -> None:
    """To two hundredths: the first slots, 0.1 of Adagrad and 1 of RMSProp, hold some of the factor."""
    whole, tenth = change(name, 1.0), change(name, 0.1)
    is_free = bool(jnp.linalg.norm(whole - tenth) < 0.02 * jnp.linalg.norm(whole))
    assert is_free == bool(warnings_of({"w": np.ones(3)}, optimizer=name, gradient_multipliers={"w": 0.1}))


def test_explain_prints_a_table_whose_columns_are_aligned() -> None:
    text = repr(build(gradient_multipliers={"embed/*": 0.1}, gradient_noise_scale=0.01).explain(SHAPES)).splitlines()
    table = text[3:7]
    assert [line.split() for line in table] == [
        ["parameter", "shape", "dtype", "trained", "key", "multiplier", "noise", "slots"],
        ["dense/bias", "(16,)", "bfloat16", "yes", "0.01", "128", "B"],
        ["dense/kernel", "(16,", "16)", "float32", "yes", "0.01", "2.0", "kB"],
        ["embed/table", "(1000,", "16)", "float32", "yes", "embed/*", "0.1", "0.01", "128.0", "kB"],
    ]
    assert len({line.index("yes") for line in table[1:]} | {table[0].index("trained")}) == 1
    assert len({len(line) for line in table}) == 1


def test_explain_leaves_out_the_middle_of_thousands_of_lines_but_not_of_the_dict() -> None:
    explained = build().explain({f"layer_{i:04}": jax.ShapeDtypeStruct((2,), np.float32) for i in range(3000)})
    lines = repr(explained).splitlines()
    assert len(lines) < 210
    assert "... 2801 more, all of them in to_dict() ..." in lines
    assert len(explained.to_dict()["parameters"]) == 3000


def test_explain_shows_a_notebook_a_table_without_markup_of_the_user_s() -> None:
    page = build(gradient_multipliers={"a<b": 0.5}).explain({"a<b": np.ones(3, np.float32)})._repr_html_()
    assert page.count("<tr>") == 2
    assert ">a&lt;b</td>" in page
    assert "a<b" not in page
    assert "<b>warning:</b> gradient_multipliers: Adam divides" in page


def scale_at(step: Any) -> Any:
    return 0.1 / (1 + step)


def test_settings_that_have_no_number_are_told_in_words() -> None:
    said = []

    @jax.jit
    def explain(rate: jax.Array) -> jax.Array:
        train = build(learning_rate=rate, gradient_multipliers={"dense/*": rate}, gradient_noise_scale=scale_at)
        said.append(train.explain(SHAPES))
        return rate

    explain(0.1)
    assert "noise by scale_at -> multipliers (1) -> Adam, rate traced -> skip" in " ".join(str(said[0]).split())
    bias = next(row for row in said[0].to_dict()["parameters"] if row["name"] == "dense/bias")
    assert (bias["multiplier"], bias["noise"]) == ("traced", "by scale_at")
