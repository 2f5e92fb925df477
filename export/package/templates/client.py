# mypy: ignore-errors
"""Converse with the server: one message a line. pip install 'tritonclient[grpc]'

    python client.py [HOST:PORT]
"""

import queue
import sys
import uuid

import numpy as np
import tritonclient.grpc as triton

MODEL = "@NAME@"


def text_input(name, text):
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def main():
    answers = queue.Queue()
    sequence = uuid.uuid4().int >> 65  # any number that no other conversation has
    with triton.InferenceServerClient(sys.argv[1] if len(sys.argv) > 1 else "localhost:8001") as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for number, line in enumerate(sys.stdin):
            inputs = [text_input("message", line.rstrip("\n"))]
            client.async_stream_infer(MODEL, inputs, sequence_id=sequence, sequence_start=number == 0)
            reason = ""
            while not reason:
                result, error = answers.get()
                if error is not None:
                    sys.exit(f"error: {error}")
                print(result.as_numpy("text")[0].decode(), end="", flush=True)
                reason = result.as_numpy("finish_reason")[0].decode()
            print()
            if reason == "context":
                sys.exit(f"[the context is full: {result.as_numpy('tokens')[0]} tokens]")
        client.stop_stream()


if __name__ == "__main__":
    main()
