"""What several tests share: tiny models, cases, stand-ins and dense references."""
