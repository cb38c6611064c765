"""CPU profiles as data: one TOML file per processor; `cores/` holds what processors of one core share."""
