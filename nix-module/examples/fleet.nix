# Twenty spokes and their hub from one list: a NixOS module for each, by host name.
#
#   nixosConfigurations = lib.mapAttrs (_: node: lib.nixosSystem { modules = [ node ./hardware.nix ]; })
#     (import ./fleet.nix { });
{
  nodes ? import ./nodes.nix,
  spokeguard ? ../module.nix,
}:
let
  hub = {
    hostname = "zurich";
    wg_ip = "10.84.0.1";
    public_key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
    endpoint = "203.0.113.47:51820";
  };
  mesh = [ "10.84.0.0/24" ];
  byName =
    value: list:
    builtins.listToAttrs (
      map (node: {
        name = node.hostname;
        value = value node;
      }) list
    );

  spoke =
    {
      hostname,
      region,
      wg_ip,
      subdomain ? "${hostname}.vault.example.org",
      kuma_url_file ? "/etc/vault/kuma-${hostname}.url",
      ...
    }:
    {
      imports = [ spokeguard ];
      networking.hostName = hostname;

      services.spokeguard = {
        enable = true;
        profile = "spoke";
        kumaUrlFile = kuma_url_file;
        wireguard.privateKeyFile = "/etc/wireguard/private.key";
        settings = {
          mesh.address = [ wg_ip ];
          mesh.prefix = mesh;
          mesh.hub = {
            address = hub.wg_ip;
            inherit (hub) public_key endpoint;
          };
          public.tcp = [
            80
            443
          ];
          ssh.from = "hub";
          file = [
            {
              path = "/etc/vault/production.env";
              mode = "0600";
            }
          ];
        };
      };

      systemd.services.vault = {
        wantedBy = [ "multi-user.target" ];
        environment.VAULT_DOMAIN = subdomain;
        environment.VAULT_REGION = region;
        serviceConfig.EnvironmentFile = "/etc/vault/production.env";
        serviceConfig.ExecStart = "/var/lib/vault/vault";
      };
    };
in
byName spoke nodes
// {
  ${hub.hostname} = {
    imports = [ spokeguard ];
    networking.hostName = hub.hostname;

    services.prometheus.enable = true;
    services.spokeguard = {
      enable = true;
      profile = "hub";
      wireguard.privateKeyFile = "/etc/wireguard/private.key";
      hub.spokes = byName (node: {
        address = [ node.wg_ip ];
        publicKey = node.public_key;
      }) nodes;
      settings = {
        mesh.address = [ hub.wg_ip ];
        mesh.prefix = mesh;
        public.tcp = [
          80
          443
        ];
        # Who administers the hub comes from these.
        ssh.from = [
          "10.84.0.2/32"
          "10.84.0.7/32"
        ];
        mesh.service = [
          {
            name = "kuma";
            tcp = [ 3001 ];
          }
        ];
      };
    };
  };
}
