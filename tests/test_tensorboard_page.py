"""TensorBoard itself, in a browser, shows what was written."""

import re
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorboard_page

import optloss
from optloss.tensorboard import AsyncWriter, EventFileWriter


@pytest.mark.slow
@pytest.mark.skipif(tensorboard_page.find_browser() is None, reason="a browser is no Python package; CI installs one")
def test_the_time_series_page_draws_every_summary(tmp_path: Path) -> None:
    """Each scalar is a card with a line of many points; the histogram has a card with a ridge for each step."""
    train = optloss.optimize_loss(
        lambda w, x: jnp.mean((w * x - 1) ** 2), 0, 0.01, "SGD", summaries=["loss", "global_gradient_norm", "gradients"]
    )
    state = train.init(jnp.full(50, 3.0))
    with AsyncWriter(EventFileWriter(tmp_path)) as writer:
        for step, x in enumerate(np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)):
            state, output = train.update(state, x)
            writer.write(output.summaries, step)
    picture = tmp_path / "page.png"
    page = tensorboard_page.time_series(tmp_path, picture)
    for tag in output.summaries:
        assert f'title="{tag}"' in page, tag
    lines = [len(re.findall("[ML]", path)) for path in re.findall(r'<path[^>]* d="([^"]+)"', page)]
    assert lines.count(40) >= 2  # of the loss and of the norm
    assert sum(points > 20 for points in lines) >= 2 + 40
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (1700, 1250)
