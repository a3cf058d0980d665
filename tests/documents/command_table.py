"""How each command of the documents is run by a test: by which one, in which smaller form, or why not at all.

A command that stands in a document and not here fails the test. `make` and `pip install` need no entry: the first is
made without doing it, of the second it is checked that the extras exist.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class By:
    """Tests that run it, as in a larger or smaller form."""

    tests: tuple[str, ...]

    def __init__(self, *tests: str) -> None:
        object.__setattr__(self, "tests", tests)


@dataclass(frozen=True)
class Options:
    """It takes long or needs more than CI has: its program starts, and knows the options that the document gives it."""

    why: str


@dataclass(frozen=True)
class Not:
    """It is not run."""

    why: str


class Run:
    """It is run as it stands, in a folder of the page that holds FILES at first; skipped where a tool is missing."""


FILES = {"graph.txt": "0 1\n1 2\n2 0\n"}


DOCTOR = "tests/cli/doctor/test_doctor_jobs.py::"
FLOWER_APP = "tests/integrations/flower/test_flower_app.py::"
NETNS = "tests/launch/test_netns_cluster.py::"
SIMULATE = "tests/cli/test_simulate_command.py::"
SUPERLINK = "tests/integrations/flower/test_flower_superlink.py::"
TOPOLOGY = "tests/cli/test_topology_command.py::"

_FLWR = By(FLOWER_APP + "test_flwr_run_prints_what_the_simulation_prints_and_its_daemon_is_ended_by_its_id")
_SECURE = By(SUPERLINK + "test_encrypted_and_with_nodes_that_are_known")
_SUPERLINK = By(SUPERLINK + "test_model_and_history_are_the_simulators_to_the_bit")
_LINK = Options("needs root and a quiet machine for many minutes")

# Patterns of whole commands, of which the first one that fits counts.
TABLE = {
    # examples
    r"torchrun .* examples/ddp_dgc.py": By(
        "tests/examples/test_ddp_dgc.py::test_a_killed_worker_is_restarted_and_the_run_ends_bit_identical"
    ),
    r"torchrun .* examples/lm_dgc.py": By(
        "tests/examples/test_lm_dgc.py::test_it_learns_dense_and_with_a_thousandth_of_the_gradient"
    ),
    r"torchrun .* examples/coded_training.py --stragglers (rotating|heavy-tailed --record trace.csv)": By(
        "tests/examples/test_coded_training.py::test_torchrun_with_a_rotating_sleeper_leaves_a_report_a_plot_and_a_trace"
    ),
    r"mpirun .* examples/coded_training.py --stragglers rotating": By(
        "tests/examples/test_coded_training.py::test_mpirun_with_a_rotating_sleeper"
    ),
    r"RANKS=5 launch/torchrun_survivors.sh examples/coded_training.py --stragglers dead": By(
        "tests/examples/test_coded_training.py::test_torchrun_survivors_with_a_killed_worker"
    ),
    r"RANKS=5 launch/mpirun.sh examples/coded_training.py --stragglers dead": By(
        "tests/examples/test_coded_training.py::test_mpirun_starter_with_a_killed_worker"
    ),
    r"torchrun .* examples/adaptive_batch.py": By("tests/examples/test_adaptive_batch_example.py::test_torchrun"),
    r"torchrun .* examples/adaptive_batch.py --test augmented --density 0.05": By(
        "tests/examples/test_adaptive_batch_example.py::test_beside_dgc"
    ),
    r"torchrun .* examples/gossip_ring.py": By(
        "tests/examples/test_gossip_ring.py::test_torchrun_writes_what_tensorboard_reads"
    ),
    r"python examples/federated_fashion.py": By(
        "tests/examples/test_federated_fashion.py::test_it_learns_says_so_and_leaves_a_plot"
    ),
    r"torchrun .* examples/federated_torchrun.py": By(
        "tests/examples/test_federated_torchrun_example.py::test_torchrun"
    ),
    r"torchrun .* examples/lightning_dgc.py": By(
        "tests/integrations/lightning/test_lightning_host.py::test_the_example_trains"
    ),
    r"RANKS=2 launch/(deepspeed|torchrun_local).sh examples/deepspeed_dgc.py --deepspeed_config .*": By(
        "tests/examples/test_deepspeed_dgc.py::test_deepspeeds_launcher_starts_it_and_torchrun_goes_on",
        "tests/examples/test_deepspeed_dgc.py::test_the_starter_prints_its_command_and_checks_its_settings",
        "tests/integrations/deepspeed/test_deepspeed_training.py::test_a_ds_config_of_ours_trains",
    ),
    r"torchrun .* examples/hsdp_dgc.py": By("tests/examples/test_hsdp_example.py::test_two_replicas_of_two_shards"),
    r"torchrun .* examples/internet_training.py": By(
        "tests/examples/test_internet_training.py::test_it_learns_the_same_model_on_two_ranks"
    ),
    # the command line
    r"distopt report runs/job/log": By("tests/observe/test_report.py::test_the_command"),
    r"distopt info": Run(),
    r"distopt compare --help": Run(),
    r"distopt link --latency .*": Run(),
    r"distopt topology .*": Run(),
    r"distopt simulate --init job.toml": Run(),
    r"distopt simulate job.toml": By(
        SIMULATE + "test_the_default_learns_and_leaves_a_table_a_history_a_plot_and_a_summary"
    ),
    r"distopt plan-code trace.csv": By("tests/cli/test_plan_code.py::test_a_trace_of_a_live_run_with_compute_times"),
    r"torchrun .* -m distopt.cli link --parameters \d+( --step-seconds \S+)?": By(
        "tests/cli/test_link.py::test_measured_between_two_ranks"
    ),
    r"\.venv/bin/distopt compare": By(
        "tests/cli/test_compare.py::test_compare_trains_three_ways_and_leaves_table_plot_and_figures"
    ),
    r"distopt job --init distopt.toml": Run(),
    r"distopt job distopt.toml": Run(),
    # the doctor
    r"RANKS=2 launch/torchrun_local.sh -m distopt.cli doctor": By(DOCTOR + "test_under_torchrun"),
    r"launch/netns_cluster.sh once 3 .* -m distopt.cli doctor": By(
        DOCTOR + "test_hosts_with_a_cut_a_slow_link_another_version_and_another_time"
    ),
    r"RANK=0 WORLD_SIZE=2 .* distopt doctor": By(DOCTOR + "test_two_sound_ranks"),
    # hosts on one machine
    r"launch/netns_cluster.sh (up|run) .*": By(NETNS + "test_two_hosts_train_with_dgc"),
    r"launch/netns_cluster.sh link .*": By(NETNS + "test_a_link_goes_down_and_up"),
    r"launch/netns_cluster.sh down": By(NETNS + "test_down_ends_what_still_runs"),
    r"launch/netns_cluster.sh once .*": By(NETNS + "test_once_leaves_nothing_also_after_a_failure"),
    # federated jobs on machines
    r'python -c "import secrets; .*" > job.secret && chmod 600 job.secret': Run(),
    r"export DISTOPT_JOB_SECRET_FILE=job.secret": By("tests/comm/test_secret.py::test_a_file_holds_it"),
    # Flower, in its own environment
    r"\(cd examples/flower_app && flwr run \. local .*\)": _FLWR,
    r"flwr run \. local .*": _FLWR,
    r"export (FLWR_\w+=\S+|RAY_\w+=0|OMP_NUM_THREADS=1| )+": _FLWR,
    r"cd examples/flower_app": _FLWR,
    r"kill \$\(pgrep .*": _FLWR,
    r"flower-superlink --insecure .*": _SUPERLINK,
    r"flower-supernode --insecure .*": _SUPERLINK,
    r"flwr run \. deployment .*": _SUPERLINK,
    r"(openssl|ssh-keygen|printf) .*": Run(),
    r"flower-superlink --ssl-.*": _SECURE,
    r"flwr supernode register .*": _SECURE,
    r"flower-supernode --root-.*": _SECURE,
    # benchmarks
    r"(sudo )?(\.venv/bin/)?python benchmarks/link.py .*": _LINK,
    r"(sudo )?(\.venv/bin/)?(python|torchrun .*) benchmarks/\w+\.py( .*)?": Options("measures, for minutes to hours"),
    # developers
    r"\.venv/bin/pre-commit install": Not("changes the hooks of the clone; CI runs the same by `make lint types`"),
}


def entry(command):
    """What the table says of a command, None if nothing."""
    return next((said for pattern, said in TABLE.items() if re.fullmatch(pattern, command)), None)
