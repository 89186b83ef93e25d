"""Reads a stream with nats-py and prints a line for each message: subject, Nats-Msg-Id, SHA-256 of the payload.

usage: read_stream.py URL STREAM COUNT
"""

import asyncio
import hashlib
import sys

import nats
from nats.js.api import AckPolicy, ConsumerConfig


async def main(url: str, stream: str, count: int) -> None:
    client = await nats.connect(url)
    # So that a large message comes whole.
    subscription = await client.jetstream().subscribe(
        ">", stream=stream, ordered_consumer=False, pending_bytes_limit=1 << 30,
        config=ConsumerConfig(ack_policy=AckPolicy.NONE, filter_subject=">"),
    )
    for _ in range(count):
        message = await subscription.next_msg(timeout=20)
        digest = hashlib.sha256(message.data).hexdigest()
        print(message.subject, (message.headers or {}).get("Nats-Msg-Id"), digest)
    await client.close()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
