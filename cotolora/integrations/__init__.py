"""CoTo in other training frameworks. Each module imports its framework; no other module imports these."""
