"""What moves bytes: each executor carries out any ``TransferPlan`` and decides nothing itself.

::

    inproc            virtual ranks of one process
    shared_memory     processes of a node: the source writes once, destinations pull (arena, slots)
    cuda_ipc          the same in device memory
    process_group     point to point over gloo or NCCL (parcels, point_to_point)
    relay             a chain of engines that pass a staged version on
    delta             what changed only, over a process group
    disk              versions in files, for whoever comes late or from afar
"""
