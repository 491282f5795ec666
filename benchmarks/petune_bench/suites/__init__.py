"""The suites that come with petune; `petune bench NAME` reads NAME.yaml from here."""
