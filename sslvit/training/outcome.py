"""The results that a run leaves when it has ended: its cost, and its model.

Results that a kill prevented, or that a run of another length left, are written when the run is resumed.
"""

from accelerate import Accelerator
from safetensors.torch import save

from sslvit.config import TrainConfig
from sslvit.data.source import Images
from sslvit.models.partial import adapters, merged
from sslvit.objectives.objective import Objective
from sslvit.runs.folder import check_still_ours
from sslvit.storage import durable, sealed
from sslvit.training.cost import peak_memory, write_cost
from sslvit.training.state import RunState, about_model
from sslvit.weights.folder import CONFIG, save_backbone

ADAPTERS = "lora.safetensors"  # the updates of --train lora by themselves; the model has them in its weights


def write_outcome(
    objective: Objective,
    source: Images,
    config: TrainConfig,
    state: RunState,
    steps: int,
    accelerator: Accelerator,
    *,
    trained: bool,
) -> None:
    """trained: whether steps were taken; else existing results of as many steps stay."""
    check_still_ours(config.out)
    cost, model = config.out / "cost.json", config.out / "model"
    images = state.step * config.batch_size
    if trained or sealed.intact(cost).get("images") != images:
        state.memory = state.memory or peak_memory(accelerator.device)
        write_cost(cost, images, state, accelerator)
    written = sealed.intact(model / CONFIG).get("sslvit")
    if trained or not isinstance(written, dict) or written.get("steps") != steps:
        about, head = about_model(objective, source, steps), objective.head_state_dict()
        save_backbone(merged(objective.backbone), model, about, head=head)
        if updates := adapters(objective.backbone):
            durable.replace(config.out / ADAPTERS, [save(updates)])
