"""Numbers as a report prints them."""

import re

from clip_jax.planning import figures


def test_figures_keep_digits_that_are_not_zero(config):
    assert (
        figures.format_bytes(0) == "0 B"
        and figures.format_bytes(96) == "96 B"
        and figures.format_bytes(3_000) == "2.93 KiB"
    )
    assert figures.format_seconds(3.2e-9) == "3.20 ns" and figures.format_seconds(0.914) == "0.914 s"
    assert figures.format_share(2.8, 10_000) == "0.028%" and figures.format_share(1, 0) == "-"
    assert figures.format_span(2.4) == "2.40 seconds" and figures.format_span(86_400 * 4.128) == "4.13 days"
    assert figures.format_number(0.00123, 2) == "0.0012" and figures.format_flops(41_153_000) == "41.153 M"
    for power in range(-15, 16):
        for show in (
            figures.format_seconds,
            figures.format_span,
            figures.format_flops,
            figures.format_number,
            lambda one: figures.format_share(one, 1),
        ):
            assert re.search("[1-9]", show(1.04 * 10.0**power)), power
        if power >= 0:
            assert re.search("[1-9]", figures.format_bytes(10**power))
