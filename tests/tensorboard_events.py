"""What TensorBoard reads in a folder."""


def scalars(folder):
    """Of each name, its events in their order, with `step`, `value` and `wall_time`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: read.Scalars(name) for name in read.Tags()["scalars"]}
