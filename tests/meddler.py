"""A man in the middle of TCP connections for tests: sees whole messages, and forwards what he likes."""

import contextlib
import socket
import struct
import threading

UP, DOWN = "up", "down"  # from the peer to the server, and back
_HANDSHAKE = {UP: (80, 32), DOWN: (80,)}
_RECORD = 64


class Meddler:
    """Listens at `address` and forwards to a server.

    Args:
        server: Its address.
        meddle: From the number of the connection (from 0), the direction, the number of the message in it and its
            bytes to the list of messages that go on instead; None ends the connection. Messages of the handshake count.
    """

    def __init__(self, server, meddle=lambda connection, direction, number, data: [data]):
        self.server = tuple(server)
        self.meddle = meddle
        self.seen = []  # (connection, direction, number, bytes), in order
        self.streams = []  # of every connection: (the peer's, the server's)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
        for pair in self.streams:
            for stream in pair:
                stream.close()

    def cut(self):
        """Ends all connections."""
        for pair in self.streams:
            for stream in pair:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)

    def say(self, connection, direction, data):
        """Says something of its own."""
        self.streams[connection][1 if direction == UP else 0].sendall(data)

    def messages(self, connection, direction):
        return [data for where, way, _, data in self.seen if (where, way) == (connection, direction)]

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                stream, _ = self._listener.accept()
                number = len(self.streams)
                try:
                    onward = socket.create_connection(self.server)
                except OSError:
                    stream.close()
                    continue
                self.streams.append((stream, onward))
                for direction in (UP, DOWN):
                    thread = threading.Thread(target=self._forward, args=(number, direction), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _forward(self, connection, direction):
        source, sink = self.streams[connection] if direction == UP else self.streams[connection][::-1]
        number = 0
        with contextlib.suppress(OSError):
            while data := self._next(source, direction, number):
                self.seen.append((connection, direction, number, data))
                instead = self.meddle(connection, direction, number, data)
                if instead is None:
                    break
                for message in instead:
                    sink.sendall(message)
                number += 1
        for stream in (source, sink):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def _next(self, stream, direction, number):
        sizes = _HANDSHAKE[direction]
        if number < len(sizes):
            return read(stream, sizes[number])
        header = read(stream, _RECORD)
        return header + read(stream, struct.unpack_from("<Q", header, 24)[0]) if header else b""


def read(stream, num_bytes):
    """So many bytes; fewer where it ends."""
    data = b""
    while len(data) < num_bytes and (more := stream.recv(num_bytes - len(data))):
        data += more
    return data


def flipped(data, at, bit=0):
    """A copy with one bit changed."""
    copy = bytearray(data)
    copy[at] ^= 1 << bit
    return bytes(copy)
