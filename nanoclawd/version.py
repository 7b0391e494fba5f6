"""The version of all host programs; generated units carry it."""

VERSION = "0.1.0"
