"""Ranks as a DeviceMesh: TP x CP for attention, and the same ranks seen anew by the FFN."""

from __future__ import annotations

from typing import Final

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from helix_gpu.bookkeeping.refusals import Refused, check_config
from helix_gpu.comm.agreement import compare, config_points, error_in_words
from helix_spec.config import Config

AXES: Final = ("tp", "cp")
"""cp varies fastest: ranks that exchange partial attentions are neighbours (MAP-1)."""
FFN_AXES: Final = ("ep", "tp")


def helix_mesh(config: Config, device_type: str = "cpu") -> DeviceMesh:
    """Return all ranks as tp_size x cp_size, with axes ("tp", "cp"); every rank calls it.

    torch.distributed is initialised.

    Parameters
    ----------
    config : Config
    device_type : str
        "cpu" or "cuda".

    Returns
    -------
    DeviceMesh

    Raises
    ------
    Refused
        With `bad_config`, for a configuration that no engine may start with, say more tp ranks than
        KV heads; before any group is made.
    ValueError
        For another number of processes; before any group is made.
    RanksDisagree
        Where the ranks are given different configurations; before any group is made.
    """
    error: Exception | None = None
    try:
        check_config(config)
        if dist.get_world_size() != config.world_size:
            raise ValueError(
                f"{dist.get_world_size()} processes run; tp_size {config.tp_size} x cp_size "
                f"{config.layout.cp_size} needs {config.world_size}."
            )
    except (Refused, ValueError) as found:
        error = found
    if dist.group.WORLD is not None and dist.get_world_size() > 1:
        # Ranks that make groups of other sizes would wait for each other.
        points = config_points(config) | {"error": error_in_words(error)}
        compare("What helix_mesh is given", points, dist.group.WORLD)
    if error is not None:
        raise error
    sizes = (config.tp_size, config.layout.cp_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=AXES)


def check_mesh(config: Config, mesh: DeviceMesh) -> None:
    """Raise unless the mesh has the axes ("tp", "cp") in the configuration's sizes.

    Parameters
    ----------
    config : Config
    mesh : DeviceMesh
        It may be a part of a larger one, as `mesh["tp", "cp"]` of pipeline stages.

    Raises
    ------
    ValueError
    """
    sizes = (config.tp_size, config.layout.cp_size)
    if mesh.mesh_dim_names != AXES or tuple(mesh.shape) != sizes:
        raise ValueError(
            f"The mesh has axes {mesh.mesh_dim_names} of sizes {tuple(mesh.shape)}; this "
            f"configuration needs {AXES} of sizes {sizes}."
        )


def slice_of(mesh: DeviceMesh) -> int:
    """Return the slice of the output projection's heads held here (MAP-1).

    It is tp_rank * cp_size + cp_rank.

    Parameters
    ----------
    mesh : DeviceMesh
        With axes ("tp", "cp").
    """
    return mesh.get_local_rank("tp") * mesh["cp"].size() + mesh.get_local_rank("cp")


def whole_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the group of all ranks of a mesh, in the order of their slices; every rank calls it.

    Parameters
    ----------
    mesh : DeviceMesh
    """
    # Flattening knows the group that covers all processes, and those of a part of a larger mesh.
    return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()


def repurposed(mesh: DeviceMesh, ep_size: int = 1) -> DeviceMesh:
    """Return the ranks of an attention mesh as the FFN uses them: experts x tensor parallel.

    Helix gives the N = tp * cp ranks of the attention to the FFN as EP x TPF = N, without moving
    anything (arXiv 2507.07120, section 2.2). Every rank calls it.

    Parameters
    ----------
    mesh : DeviceMesh
    ep_size : int
        Groups of experts; 1 for a dense FFN.

    Returns
    -------
    DeviceMesh
        With axes ("ep", "tp"), tp the faster one.

    Raises
    ------
    ValueError
        If ep_size does not divide the ranks, or if the mesh is a part of a larger one: its groups
        can only be made by all processes together.
    """
    ranks = mesh.size()
    if ranks != dist.get_world_size():
        raise ValueError(
            f"The mesh holds {ranks} of {dist.get_world_size()} processes; the FFN's needs all."
        )
    if ep_size < 1 or ranks % ep_size:
        raise ValueError(f"ep_size is {ep_size}; it must divide the {ranks} ranks of the mesh.")
    grid = mesh.mesh.reshape(ep_size, ranks // ep_size)
    return DeviceMesh(mesh.device_type, grid, mesh_dim_names=FFN_AXES)
