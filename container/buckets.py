"""Makes the buckets of the artifact store that lack: python buckets.py NAME ..."""

import sys

import boto3


def main(names: list[str]) -> None:
    """AWS_ENDPOINT_URL and the AWS_ variables of the credentials name the store."""
    client = boto3.client("s3")
    known = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in names:
        if name not in known:
            client.create_bucket(Bucket=name)
            print(f"bucket {name}: made")


if __name__ == "__main__":
    main(sys.argv[1:])
