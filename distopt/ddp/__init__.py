"""The link is slow: send a thousandth of the gradient each step, as a communication hook of stock DDP."""

from distopt.comm import Link
from distopt.ddp.attachment import Attachment
from distopt.ddp.bucket import Bucket, FlatBucket
from distopt.ddp.dense import Dense
from distopt.ddp.dgc import DGC
from distopt.ddp.host import FeedHost, Host
from distopt.ddp.schedule import ExponentialWarmup, ListWarmup, PaperWarmup, Schedule
from distopt.ddp.topk import TopK

__all__ = [
    "DGC",
    "Attachment",
    "Bucket",
    "Dense",
    "ExponentialWarmup",
    "FeedHost",
    "FlatBucket",
    "Host",
    "Link",
    "ListWarmup",
    "PaperWarmup",
    "Schedule",
    "TopK",
]
