"""The grown network in files of formats that others read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._typing import Array, Params
from esper_fn.checkpoint._structure import build, describe
from esper_fn.errors import CheckpointError
from esper_fn.export._adapters import Adapter

FORMAT = "esper-fn network"
VERSION = 1


class Network(NamedTuple):
    """A network read back."""

    params: Params
    """Parameters of the host, folded adapters included."""
    adapters: list[Adapter]
    note: Mapping[str, Any]


def write_safetensors(
    path: Path, params: Params, adapters: Sequence[Adapter], note: Mapping[str, Any]
) -> None:
    """Writes tensors `host/PATH` and `adapter/SEED/PATH`, and the rest as JSON in the metadata.

    Args:
      path: the file.
      params: parameters of the host.
      adapters: those that act beside it.
      note: JSON for `Network.note`.

    Raises:
      ModuleNotFoundError: without the package `safetensors` (extra `cli`).
    """
    import safetensors.flax

    tensors: dict[str, Array] = {}

    def put(prefix: str, tree: Params) -> dict[str, Any]:
        structure, leaves, arrays = describe(tree)
        for leaf, array in zip(leaves, arrays, strict=True):
            if leaf.is_scalar or leaf.key is not None:
                raise CheckpointError(f"{leaf.path}: only plain arrays here, got {leaf.dtype}")
            tensors[f"{prefix}/{leaf.path}"] = jnp.asarray(array)
        return {"structure": structure, "names": [leaf.path for leaf in leaves]}

    content = {
        "format": FORMAT,
        "version": VERSION,
        "host": put("host", params),
        "adapters": [
            {**adapter._asdict(), "params": put(f"adapter/{adapter.seed}", adapter.params)}
            for adapter in adapters
        ],
        "note": dict(note),
    }
    safetensors.flax.save_file(tensors, path, {"esper_fn": json.dumps(content, allow_nan=False)})


def read_safetensors(path: Path) -> Network:
    """Reads what `write_safetensors` wrote.

    Args:
      path: the file.

    Raises:
      CheckpointError: another file, or of a newer version.
    """
    import safetensors
    import safetensors.flax

    try:
        with safetensors.safe_open(path, framework="flax") as file:
            header = (file.metadata() or {}).get("esper_fn")
            content = json.loads(header) if header else None
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise CheckpointError(f"{path}: the file is not an {FORMAT}")
            if content.get("version") != VERSION:
                raise CheckpointError(
                    f"{path}: version {content.get('version')!r}; this one reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from None

    def take(prefix: str, tree: Mapping[str, Any]) -> Params:
        return build(tree["structure"], [tensors[f"{prefix}/{name}"] for name in tree["names"]])

    try:
        return Network(
            params=take("host", content["host"]),
            adapters=[
                Adapter(**{**row, "params": take(f"adapter/{row['seed']}", row["params"])})
                for row in content["adapters"]
            ],
            note=content["note"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the file lacks {error}") from None


def write_stablehlo(
    folder: Path,
    network: Callable[[Array], Array],
    inputs: np.ndarray,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> list[Path]:
    """Writes the network, parameters inside, as one program over batches of any size.

    Args:
      folder: gets `network.jax_export`, for `jax.export.deserialize(...).call(inputs)`, and
        `network.mlirbc`, the same as StableHLO in MLIR's portable bytecode.
      network: `inputs -> logits`.
      inputs: an example, `[N, ...]`; only shape and dtype are read.
      platforms: those on which it is to run.

    Returns:
      The files.
    """
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    exported = export.export(jax.jit(network), platforms=list(platforms))(spec)
    files = {
        "network.jax_export": exported.serialize(),
        "network.mlirbc": exported.mlir_module_serialized,
    }
    for name, data in files.items():
        (folder / name).write_bytes(bytes(data))
    return [folder / name for name in files]


def read_stablehlo(folder: Path) -> Callable[[Any], Array]:
    """The program that `write_stablehlo` wrote: `inputs -> logits`.

    Args:
      folder: the same as for `write_stablehlo`.
    """
    from jax import export

    data = (folder / "network.jax_export").read_bytes()
    exported = export.deserialize(bytearray(data))
    return lambda inputs: exported.call(jnp.asarray(inputs))
