"""What somebody with a stolen credential does in a process of their own: commands from stdin, answers to stdout."""

import json
import sys
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


def main() -> None:
    asked = json.load(sys.stdin)
    answers = []
    client = redis.Redis.from_url(asked["url"], socket_timeout=5, retry=Retry(NoBackoff(), 0))
    connection: Any = client.connection_pool.get_connection()
    for command in asked["commands"]:
        if asked["fresh"]:
            connection.disconnect()
        try:
            connection.send_command(*command)
            answers.append(repr(connection.read_response()))
        except redis.exceptions.NoPermissionError:
            answers.append("refused")
        except redis.ResponseError as error:
            answers.append(f"error {error}")
        except redis.ConnectionError:
            answers.append("disconnected")
            connection.disconnect()
    print(json.dumps(answers))


main()
