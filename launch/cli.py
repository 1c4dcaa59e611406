def main() -> None:
    print("manta")
