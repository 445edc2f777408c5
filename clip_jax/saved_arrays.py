"""Saves and restores trees of arrays with orbax, together with a digest of each array's bytes.

Each host digests the pieces that it writes, from the copies in its memory that orbax writes, in a thread. The
digests are files in the folder of the arrays, ``digests/KIND-HOST.json``, and appear together with them. Restoring
compares: each host the parts of an array that it holds. Pieces that no host holds completely, as when there are more
hosts than before, are read once more, each by one host.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

# Not public: orbax has no other way to the copies that it writes. Reading them from the device again, or from the disk,
# would take longer than all else here.
from orbax.checkpoint._src.serialization import replica_slices
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future
from orbax.checkpoint.type_handlers import ParamInfo

from clip_jax.digests import (
    Box,
    DamagedError,
    SavedArray,
    box_of,
    check,
    check_finite,
    common,
    covers,
    digest,
    from_json,
    to_json,
    whole,
)
from clip_jax.errors import first_line

FOLDER = "digests"
METADATA = "_METADATA"  # orbax's names of the arrays
ARRAY_OPTIONS = {
    "min_slice_bytes_for_replica_parallel": 2**20,  # below, one host writes an array of which several have a copy
    "enable_write_sharding_file": False,  # restoring states the shardings, and damage to the file would be an error
}


def handler(numpy: ocp.type_handlers.NumpyHandler | None = None) -> ocp.PyTreeCheckpointHandler:
    """Returns orbax's handler of a tree, which saves digests and verifies what it restores."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, _ArrayHandler(**ARRAY_OPTIONS)),
        (np.ndarray, numpy or _NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def restore_like(directory: epath.Path, template: dict) -> dict:
    """Returns saved arrays with the shapes, dtypes and shardings of the template. Not a barrier between hosts.

    Raises:
      DamagedError: an array differs from its digest, or has values that are not finite.
      Exception: of many types: the files cannot be read, or are of other arrays than the template's.
    """
    _check_metadata(directory)
    arguments = ocp.checkpoint_utils.construct_restore_args(template)
    return handler().restore(directory, args=ocp.args.PyTreeRestore(item=template, restore_args=arguments))


def restore_as_numpy(directory: epath.Path, names: Sequence[str]) -> dict:
    """Returns those of the named subtrees that were saved, as numpy arrays.

    Raises:
      DamagedError, Exception: as :func:`restore_like`.
    """
    saved = _saved_tree(directory)
    wanted = {name: saved[name] for name in names if saved.get(name)}
    return _restore_as_numpy(handler(), directory, wanted)


def find_damage(directory: epath.Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Returns one line for each damaged array, and all arrays that have only one element, by name.

    Keeps one array in memory at a time, and uses no device.

    Raises:
      DamagedError, Exception: as :func:`restore_like`, if the arrays cannot be found.
    """
    checker = _NumpyChecker()
    _restore_as_numpy(handler(checker), directory, _saved_tree(directory))
    lost = (read_digests(directory) or {}).keys() - checker.names
    return [*checker.damage, *(f"{name} is missing" for name in sorted(lost))], checker.single


def explain(error: Exception) -> str:
    """Returns the line of an error by orbax or tensorstore that names the array or the file."""
    while error.__cause__ is not None:  # the first line of the outer error lists slices
        error = error.__cause__
    return re.sub(r"""Error opening "\w+" driver: | \[[\w\[\]]+='.*""", "", first_line(error))


def _saved_tree(directory: epath.Path) -> dict:
    _check_metadata(directory)
    return handler().metadata(directory).tree


def _check_metadata(directory: epath.Path) -> None:
    name = f"{directory.name}/{METADATA}"
    try:
        json.loads((directory / METADATA).read_bytes())
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise DamagedError(f"{name} is not JSON") from None


def _restore_as_numpy(tree_handler: ocp.PyTreeCheckpointHandler, directory: epath.Path, wanted: dict) -> dict:
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        partial_restore=True,
    )
    return tree_handler.restore(directory, args=arguments)


def has_digests(directory: epath.Path) -> bool:
    """Returns whether arrays were saved with digests. Earlier versions of this program did not write any."""
    return (directory / FOLDER).exists()


def read_digests(directory: epath.Path) -> dict[str, SavedArray] | None:
    """Returns the digests of saved arrays by name, or None if they were saved without.

    Raises:
      DamagedError: the digests are damaged or incomplete.
    """
    if not has_digests(directory):
        return None
    folder = directory / FOLDER
    return from_json({f"{directory.name}/{FOLDER}/{file.name}": file.read_bytes() for file in folder.iterdir()})


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Saves and restores JAX's arrays, with digests."""

    async def metadata(self, infos):
        async with _no_task_left():
            return await super().metadata(infos)

    async def serialize(self, values, infos, args=None):
        with _transferred() as on_host:
            futures = await super().serialize(values, infos, args)
        if len(on_host) != len(infos):
            raise RuntimeError(f"orbax copied {len(on_host)} of {len(infos)} arrays to the host")

        def pieces(array: replica_slices.ReplicaSlices) -> dict[Box, np.ndarray]:
            return {box_of(one.index, array.global_shape): np.asarray(one.data()) for one in array.replica_slices}

        described = ((info.name, array.global_shape, pieces(array)) for info, array in zip(infos, on_host, strict=True))
        return [*futures, _digests_after(futures, self.typestr(), infos[0], described)]

    async def deserialize(self, infos, args=None):
        async with _no_task_left():
            arrays = await super().deserialize(infos, args)
        digests = read_digests(infos[0].parent_dir)
        for info, array in zip(infos, arrays, strict=True):
            parts = {box_of(part.index, array.shape): part.data for part in array.addressable_shards}
            parts = {box: np.asarray(part) for box, part in parts.items()}
            if digests is None:
                check_finite(info.name, parts.values())
                continue
            saved = _saved(digests, info.name, array.shape)
            check(info.name, saved, parts)
            if any(_reads(number, array, piece) for number, piece in enumerate(sorted(saved.pieces))):
                await _NumpyHandler().deserialize([info])
        return arrays


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Saves and restores numpy arrays, which are complete on each host, with digests."""

    async def metadata(self, infos):
        async with _no_task_left():
            return await super().metadata(infos)

    async def serialize(self, values, infos, args=None):
        futures = await super().serialize(values, infos, args)
        pieces = [{whole(value.shape): value} if jax.process_index() == 0 else {} for value in values]
        described = ((info.name, value.shape, one) for info, value, one in zip(infos, values, pieces, strict=True))
        return [*futures, _digests_after(futures, self.typestr(), infos[0], described)]

    async def deserialize(self, infos, args=None):
        digests = read_digests(infos[0].parent_dir)
        if digests is not None:  # before memory is allocated for a shape that is damaged
            for info, saved in zip(infos, await self.metadata(infos), strict=True):
                _saved(digests, info.name, saved.shape)
        async with _no_task_left():
            arrays = await super().deserialize(infos, args)
        for info, array in zip(infos, arrays, strict=True):
            if digests is None:
                check_finite(info.name, [array])
            else:
                check(info.name, digests[info.name], {whole(array.shape): array})
        return arrays


class _NumpyChecker(_NumpyHandler):
    """Reads arrays one at a time, returns none of them, and lists those that are damaged."""

    def __init__(self):
        super().__init__()
        self.damage: list[str] = []
        self.names: set[str] = set()
        self.single: dict[str, np.ndarray] = {}

    async def deserialize(self, infos, args=None):
        for number, info in enumerate(infos):
            self.names.add(info.name)
            try:
                [array] = await super().deserialize([info], args and [args[number]])
                if array.size == 1:
                    self.single[info.name] = array
            except DamagedError as error:
                self.damage.append(str(error))
            except Exception as error:  # tensorstore raises many types
                self.damage.append(f"{info.name} cannot be read: {explain(error)}")
        return [np.zeros(0)] * len(infos)


@contextlib.contextmanager
def _transferred() -> Iterator[list[replica_slices.ReplicaSlices]]:
    """Yields a list of the copies that orbax makes of arrays in the memory of the host, in the order of the arrays."""
    copies, transfer = [], replica_slices.transfer_arrays_to_host

    def keep(*args, **kwargs):
        copied = transfer(*args, **kwargs)
        copies.extend(copied)
        return copied

    replica_slices.transfer_arrays_to_host = keep
    try:
        yield copies
    finally:
        replica_slices.transfer_arrays_to_host = transfer


@contextlib.asynccontextmanager
async def _no_task_left() -> AsyncIterator[None]:
    """If the block raises, waits for the tasks that it has started. tensorstore prints a traceback for each of its
    operations that ends after its event loop was closed."""
    before = asyncio.all_tasks()
    try:
        yield
    except Exception:
        if tasks := asyncio.all_tasks() - before:
            await asyncio.wait(tasks)
        raise


def _digests_after(
    futures: Sequence[Future],
    kind: str,
    place: ParamInfo,
    arrays: Iterable[tuple[str, tuple[int, ...], dict[Box, np.ndarray]]],
) -> Future:
    """Starts to write digests when the arrays have been written: a thread that hashes would delay the next step.

    Args:
      futures: of the arrays.
      kind: start of the name of the file.
      place: has the folder of the arrays.
      arrays: name, shape and pieces in the memory of this host, read in the thread that writes.
    """

    async def write() -> None:
        for future in futures:
            await asyncio.to_thread(future.result)
        digests = {
            name: SavedArray(shape, _dtype(pieces), {box: digest(piece) for box, piece in pieces.items()})
            for name, shape, pieces in arrays
            if pieces
        }
        folder = place.parent_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{kind}-{jax.process_index()}.json").write_text(to_json(digests, jax.process_count()))

    return CommitFutureAwaitingContractedSignals(write(), name="digests")


def _dtype(pieces: dict[Box, np.ndarray]) -> str:
    return next(iter(pieces.values())).dtype.name


def _saved(digests: dict[str, SavedArray], name: str, shape: Sequence[int]) -> SavedArray:
    if name not in digests:
        raise DamagedError(f"{name} has no digest")
    saved = digests[name]
    if tuple(shape) != saved.shape:
        raise DamagedError(f"{name} has the shape {list(shape)}, but {list(saved.shape)} was saved")
    return saved


def _reads(number: int, array: jax.Array, piece: Box) -> bool:
    """Returns whether this host must read a piece to verify it: no host holds all of it, and it is this one's turn."""
    if number % jax.process_count() != jax.process_index():
        return False
    held: dict[int, set[Box]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        box = box_of(index, array.shape)
        if common(box, piece) == piece:
            return False
        held.setdefault(device.process_index, set()).add(box)
    return not any(covers(parts, piece) for parts in held.values())
