-- The roles of the processes, and what each may do with the views. Run it as an administrator in the database that
-- ARTIFACT_STORE_VIEWS_URL names, before `artifact-store migrate` and once more after it, for the tables of webhooks; it may
-- be repeated. Then give each role a way to log in:
--   ALTER ROLE artifact_store_gateway PASSWORD '…';  -- or certificates: pg_hba.conf with `hostssl … cert`
-- In pg_hba.conf let these roles in by `hostssl` lines alone, so that none of them can log in without TLS.

DO $$
DECLARE name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['owner', 'migrate', 'replay', 'projector', 'gateway', 'verify', 'webhooks'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'artifact_store_' || name) THEN
      EXECUTE format('CREATE ROLE %I NOSUPERUSER NOCREATEDB NOCREATEROLE', 'artifact_store_' || name);
    END IF;
  END LOOP;
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format(
    'GRANT CONNECT ON DATABASE %I TO artifact_store_migrate, artifact_store_replay, artifact_store_projector, '
    'artifact_store_gateway, artifact_store_verify, artifact_store_webhooks', current_database());
  EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO artifact_store_projector, artifact_store_owner', current_database());
END $$;

ALTER ROLE artifact_store_migrate LOGIN;
ALTER ROLE artifact_store_replay LOGIN;
ALTER ROLE artifact_store_projector LOGIN;
ALTER ROLE artifact_store_gateway LOGIN;
ALTER ROLE artifact_store_verify LOGIN;
ALTER ROLE artifact_store_webhooks LOGIN;

-- Tables are made by `migrate` and `replay` alone, and belong to one role whichever of them made them.
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO artifact_store_owner;
GRANT artifact_store_owner TO artifact_store_migrate, artifact_store_replay;
ALTER ROLE artifact_store_migrate SET role = 'artifact_store_owner';
ALTER ROLE artifact_store_replay SET role = 'artifact_store_owner';

-- Projectors write rows; gateways and the oracle read them.
GRANT USAGE ON SCHEMA public
  TO artifact_store_projector, artifact_store_gateway, artifact_store_verify, artifact_store_webhooks;
ALTER DEFAULT PRIVILEGES FOR ROLE artifact_store_owner IN SCHEMA public
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO artifact_store_projector;
ALTER DEFAULT PRIVILEGES FOR ROLE artifact_store_owner IN SCHEMA public
  GRANT SELECT ON TABLES TO artifact_store_gateway, artifact_store_verify, artifact_store_webhooks;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO artifact_store_projector;
GRANT SELECT ON ALL TABLES IN SCHEMA public
  TO artifact_store_gateway, artifact_store_verify, artifact_store_webhooks;

-- Subscriptions belong to no view: gateways change them, the process `webhooks` saves what it delivered, and nobody else
-- reads their secrets. `doctor` and `status` count subscriptions, and look whether a process delivers.
DO $$
DECLARE name text;
BEGIN
  FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename LIKE 'webhook\_%' LOOP
    EXECUTE format('REVOKE ALL ON %I FROM artifact_store_projector, artifact_store_verify', name);
    EXECUTE format(
      'GRANT SELECT, INSERT, UPDATE, DELETE ON %I TO artifact_store_gateway, artifact_store_webhooks', name);
  END LOOP;
  IF to_regclass('public.webhook_deliverer') IS NOT NULL THEN
    GRANT SELECT (state) ON webhook_subscriptions TO artifact_store_verify;
    GRANT SELECT ON webhook_deliverer TO artifact_store_verify;
  END IF;
END $$;
