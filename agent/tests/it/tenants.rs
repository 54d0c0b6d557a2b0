//! Tests of tenants.
