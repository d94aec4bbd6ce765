"""Steering and watching a running experiment from elsewhere. No JAX inside.

See `docs/bus.md`. Needs the extra `bus`: `pip install 'esper-fn[bus]'`.
"""

from esper_fn.bus._address import MEMORY, Address, hide_addresses, parse_address
from esper_fn.bus._broker import Broker
from esper_fn.bus._client import AsyncClient, connect_async
from esper_fn.bus._codec import FORMAT, SCHEMA, Header, Parcel, Schema
from esper_fn.bus._connect import make_transport
from esper_fn.bus._intake import Intake, Taken
from esper_fn.bus._memory import MemoryTransport
from esper_fn.bus._messages import (
    Alert,
    Announcement,
    Batch,
    Cancel,
    Checkpoint,
    CheckpointEvent,
    Column,
    Command,
    Cull,
    DeadLetter,
    EmergencyStop,
    Frame,
    Germinate,
    Heartbeat,
    HoldSeed,
    LetSeedGo,
    LifecycleEvent,
    Message,
    Outcome,
    Pause,
    Probe,
    Release,
    Resume,
    RollBack,
    SeedCommand,
    SeedOutcome,
    SetGraft,
    StepMetrics,
    Transition,
    new_id,
)
from esper_fn.bus._plain_client import Client, connect
from esper_fn.bus._position import RunPosition
from esper_fn.bus._publisher import Publisher, ServerTime
from esper_fn.bus._redis import RedisTransport
from esper_fn.bus._resilience import CircuitBreaker, RateLimiter, Retry
from esper_fn.bus._server import PrivateServer
from esper_fn.bus._signing import NO_KEYS, Keyring, new_key, read_keys
from esper_fn.bus._station import Station
from esper_fn.bus._topics import POLICIES, Guarantee, Topic, TopicPolicy, WhenFull
from esper_fn.bus._transport import (
    Attached,
    Delivery,
    Entry,
    Lease,
    LeaseHeldError,
    OtherRunError,
    Published,
    Renewed,
    Settlement,
    Transport,
)

__all__ = [
    "FORMAT",
    "MEMORY",
    "NO_KEYS",
    "POLICIES",
    "SCHEMA",
    "Address",
    "Alert",
    "Announcement",
    "AsyncClient",
    "Attached",
    "Batch",
    "Broker",
    "Cancel",
    "Checkpoint",
    "CheckpointEvent",
    "CircuitBreaker",
    "Client",
    "Column",
    "Command",
    "Cull",
    "DeadLetter",
    "Delivery",
    "EmergencyStop",
    "Entry",
    "Frame",
    "Germinate",
    "Guarantee",
    "Header",
    "Heartbeat",
    "HoldSeed",
    "Intake",
    "Keyring",
    "Lease",
    "LeaseHeldError",
    "LetSeedGo",
    "LifecycleEvent",
    "MemoryTransport",
    "Message",
    "OtherRunError",
    "Outcome",
    "Parcel",
    "Pause",
    "PrivateServer",
    "Probe",
    "Published",
    "Publisher",
    "RateLimiter",
    "RedisTransport",
    "Release",
    "Renewed",
    "Resume",
    "Retry",
    "RollBack",
    "RunPosition",
    "Schema",
    "SeedCommand",
    "SeedOutcome",
    "ServerTime",
    "SetGraft",
    "Settlement",
    "Station",
    "StepMetrics",
    "Taken",
    "Topic",
    "TopicPolicy",
    "Transition",
    "Transport",
    "WhenFull",
    "connect",
    "connect_async",
    "hide_addresses",
    "make_transport",
    "new_id",
    "new_key",
    "parse_address",
    "read_keys",
]
