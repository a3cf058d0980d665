"""What the python in documents needs around it to run: in pages that show a line or two of a user's program.

Everything runs on three ranks, block after block, the names of one being there in the next.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Elsewhere:
    """Tests of its own run the page, or the programs that it shows lines of."""

    tests: tuple[str, ...]

    def __init__(self, *tests: str) -> None:
        object.__setattr__(self, "tests", tests)


@dataclass(frozen=True)
class Context:
    """`first` runs before the first block, `each` before each one; `smaller` replaces what stands in the page."""

    first: str = ""
    each: str = ""
    smaller: dict[str, str] = field(default_factory=dict)


_MODEL = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import distopt
torch.manual_seed(0)  # the ranks may have drawn differently often before
data = images = torch.randn(1024, 8)
labels = torch.arange(1024) % 2

def loss_sum(model, samples):
    return model(samples).square().sum()

def evaluate(model):
    return {"loss": nn.functional.cross_entropy(model(images), labels)}
"""
_ANEW = """
for name in ("attachment", "attached", "coded"):
    if name in globals():
        globals().pop(name).detach()
torch.manual_seed(0)
model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
"""
_SECOND = """
model_a, model_b = nn.Linear(8, 2), nn.Linear(8, 2)
opt_a, opt_b = (torch.optim.SGD(each.parameters(), lr=0.01) for each in (model_a, model_b))
"""

_GOSSIP = "tests/gossip/test_gossip_docs.py::"
_FEDERATED_TEST = Elsewhere(
    "tests/federated/test_federated_docs.py::test_the_code_runs_and_the_plugin_s_error_is_the_one_shown"
)

CONTEXTS = {
    "README.md": Context(
        first=_MODEL,
        each=_ANEW,
        smaller={"coded.steps(1000)": "coded.steps(3)", "simulation.run(500)": "simulation.run(2)"},
    ),
    "docs/ddp.md": Context(
        first=_MODEL + _ANEW + "loader, step = range(10), 1",
        smaller={"\ndistopt.checkpoint.load(": "\ndist.barrier()\ndistopt.checkpoint.load("},  # here it follows at once
    ),
    "docs/jobs.md": Context(
        first=_MODEL
        + _ANEW
        + """
from pathlib import Path
Path("distopt.toml").write_text('algorithm = "dgc"\\n[checkpoint]\\n[log]\\n')
model = DistributedDataParallel(model)
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

def batch(step):
    return images[:4], labels[:4]
""",
        smaller={"run.steps(10_000)": "run.steps(3)"},
    ),
    "docs/links.md": Context(first="import distopt"),
    "docs/batch.md": Context(
        first=_MODEL
        + _ANEW
        + """
from torch.utils.data import DataLoader, TensorDataset
train_set = TensorDataset(images, labels)
loss_fn = nn.functional.cross_entropy

def refined_of_an_earlier_run():
    return distopt.batch.RefinedDecay(at=(0.0, 0.5), factors=(1.0, 0.5))
""",
        smaller={"range(10)": "range(2)"},
    ),
    "docs/coding.md": Context(
        first=_MODEL + _ANEW + _SECOND,
        smaller={
            "coded.steps(1000)": "coded.steps(3)",
            "n=256, burst=1, window=2, stragglers=27": "n=2, burst=1, window=2, stragglers=1",
        },
    ),
    "docs/frameworks.md": Elsewhere(
        "tests/integrations/accelerate/test_accelerate_host.py::test_the_example_trains",
        "tests/integrations/lightning/test_lightning_host.py::test_the_example_trains",
        "tests/integrations/lightning/test_fabric_host.py::test_the_example_trains",
        "tests/integrations/transformers/test_trainer_host.py::test_the_example_trains",
    ),
    "docs/deepspeed.md": Elsewhere(
        "tests/examples/test_deepspeed_dgc.py::test_deepspeeds_launcher_starts_it_and_torchrun_goes_on",
        "tests/integrations/deepspeed/test_deepspeed_training.py::test_the_change_that_the_page_shows_trains",
    ),
    "docs/observability.md": Context(
        first=_MODEL
        + _ANEW
        + "import numpy as np\n"
        + "model = DistributedDataParallel(model)\n"
        + "clients = distopt.federated.ClientData((images, labels), [np.arange(512), np.arange(512, 1024)])",
        smaller={"model=model": "model=nn.Linear(8, 2)"},
    ),
    "docs/fsdp.md": Elsewhere("tests/integrations/fsdp/test_hsdp.py::test_resumed_is_uninterrupted"),
    "docs/gossip.md": Elsewhere(_GOSSIP + "test_the_code_of_the_entry_page_runs_on_ranks"),
    "docs/gossip/algorithms.md": Elsewhere(_GOSSIP + "test_the_code_of_the_other_pages_runs"),
    "docs/gossip/topologies.md": Elsewhere(_GOSSIP + "test_the_code_of_the_other_pages_runs"),
    "docs/local.md": Context(smaller={'dist.init_process_group("gloo")\n': ""}),
    "docs/federated.md": _FEDERATED_TEST,
    **{
        f"docs/federated/{name}.md": _FEDERATED_TEST
        for name in ("asynchronous", "averaging", "drift", "machines", "privacy", "robust")
    },
    "docs/federated/flower.md": Elsewhere(
        "tests/integrations/flower/test_flower_app.py::test_the_page_shows_the_code_of_the_app"
    ),
}
