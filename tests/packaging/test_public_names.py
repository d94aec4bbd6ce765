"""The public surface: what users may rely on, by module."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import esper_fn

SURFACE = {
    "esper_fn": (
        "Growth GrowthState NoSeeds Stage StepInfo SurveyInfo __version__ blueprints checkpoint \
commands discover_sites errors flax governors grafting lifecycle optim policies runtime site \
use_seeds"
    ),
    "esper_fn.blueprints": (
        "AdapterSpec ApplyAdapter Blueprint Cost CostAdapter InitAdapter InitAlong TOPOLOGIES \
Topology bottleneck bottleneck_conv check depthwise_conv gated low_rank noop normalised \
scale_shift self_attention squeeze_excite"
    ),
    "esper_fn.bus": (
        "Alert Announcement AsyncClient Batch Broker COMMANDS Cancel Checkpoint CheckpointEvent \
Client Column Command Cull DeadLetter Frame Germinate Heartbeat Keyring LifecycleEvent \
Message NO_KEYS Outcome Pause PauseSeed PrivateServer Release Resume ResumeSeed RollBack \
RunPosition SeedCommand SeedOutcome SetGraft StepMetrics Stop Topic Transition connect \
connect_async new_key read_keys verb"
    ),
    "esper_fn.checkpoint": (
        "CheckpointWarning Damage Decision Restored Retention Writer best check every everything \
latest pinned prune register restore save steps verify within_bytes"
    ),
    "esper_fn.commands": (
        "Code Command Commands Kind Outcomes batch cancel cull germinate pause_seed release \
resume_seed roll_back set_graft transition"
    ),
    "esper_fn.errors": (
        "BusAddressError BusError BusSecurityError BusUnavailableError BusyError CheckpointError \
CommandError CorruptCheckpointError CorruptDataError DataError EsperError FencedError \
ForgedError LayoutError LeaseHeldError MessageError MissingDataError NoCheckpointError \
NoOutcomeError NobodyListensError NonFiniteLossError OversizedError ReplayedError \
ResumeError RunFolderError RunStoppedError UndecodableError UnknownDatasetError \
UnknownNameError UnreadableCheckpointError UnsupportedVersionError"
    ),
    "esper_fn.export": (
        "Adapter FixedSeeds Network acting_adapters fixed_seeds fold lineage read_safetensors \
read_stablehlo write_safetensors write_stablehlo"
    ),
    "esper_fn.flax": "linen nnx",
    "esper_fn.governors": (
        "Alarm Governor Init Observation Update Verdict check disabled standard"
    ),
    "esper_fn.grafting": (
        "AlphaSchedule Init Observation Update adaptive check drift_controlled grad_norm_gated \
linear momentum stability"
    ),
    "esper_fn.lifecycle": (
        "ACTS Cause EDGES Edge FAST_STEPS GUARD_EDGES Gate LossTrack NONE NUM_STAGES ON_ITS_WAY \
OWNS_ADAPTER Seed SeedState Settings Stage TRANSITIONS Telemetry is_in settings"
    ),
    "esper_fn.monitoring": ("Exporter MAX_SERIES METRICS Metric serve"),
    "esper_fn.optim": (
        "AdapterGradients PerAdapterState Slots apply_updates per_adapter plain_gradients"
    ),
    "esper_fn.policies": (
        "Admit Decide Init Observation Policy Requests Score budget chain check cooldown grow \
max_concurrent max_total never no_requests periodic plateau random recycle refuse request rule \
scripted seed_blueprints stop_after"
    ),
    "esper_fn.report": ("Run RunFolder create figures measure_segment read render write_report"),
    "esper_fn.rollback": ("NUM_SNAPSHOTS Ring Snapshot init reference_loss take_snapshot update"),
    "esper_fn.runtime": (
        "Checkpoints Fit FitOptions Segment Steering TrainState array_batches compile_fit \
compile_fit_host count_compilations enlarge fit fit_host init lifecycle_events make_step \
make_survey restore_state save_state scan_steps stage_counts steer termination"
    ),
    "esper_fn.types": ("Bank Implementation Layout Moments Seeds Site Statistics"),
}
# Without `__all__`: the demonstration and the command line.
OTHERS = {"cli", "demo"}


@pytest.mark.parametrize("name", SURFACE)
def test_the_public_names_are_these(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == SURFACE[name].split()
    assert all(hasattr(module, member) for member in module.__all__)


def test_every_public_module_is_in_the_table() -> None:
    names = {module.name for module in pkgutil.iter_modules(esper_fn.__path__)}
    public = {name for name in names if not name.startswith("_")} - OTHERS
    assert {f"esper_fn.{name}" for name in public} | {"esper_fn"} == set(SURFACE)


def test_the_front_door_is_small() -> None:
    assert dir(esper_fn) == esper_fn.__all__
    assert len(esper_fn.__all__) <= 21
