"""What every process of EPD has around its work: logs, signals, systemd, its host, and what it holds.

Lives in every process.
"""
