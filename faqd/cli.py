"""faqd: the three command lines under one name."""

from __future__ import annotations

import click

from faqd.benchmarks.cli import bench_command
from faqd.command import SETTINGS, Group, run, version_option
from faqd.deploy.cli import cli as deploy
from faqd.train.cli import cli as train


@click.group(cls=Group, context_settings=SETTINGS)
@version_option
def cli() -> None:
    """Make a small INT8 engine of a float network, without labels, and prove that it computes what was trained.

    `faqd train` is the same as `faqd-train`, `faqd deploy` as `faqd-deploy`, `faqd bench` as `faqd-bench`.
    """


cli.add_command(train, "train")
cli.add_command(deploy, "deploy")
cli.add_command(bench_command, "bench")


def main() -> None:
    run(cli)
