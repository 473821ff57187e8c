# Twenty spokes and their hub from one list: a NixOS module for each, by host name.
#
#   nixosConfigurations = lib.mapAttrs (_: node: lib.nixosSystem { modules = [ node ./hardware.nix ]; })
#     (import ./fleet.nix { });
#
# The list may be that of an inventory, as `spokeguard fleet render` writes it:
#
#   fleet = lib.importJSON ./rendered/nix/nodes.json;
#   import ./fleet.nix { nodes = builtins.attrValues fleet.nodes; hub = fleet.nodes.${fleet.hub}; }
#
# Who they are comes from there. What they open, to whom and which files count is written below,
# and is this fleet's (a vault): edit it for another, above all the hub's ssh.from.
{
  nodes ? import ./nodes.nix,
  # Whose address, key and endpoint every spoke gets.
  hub ? builtins.head (builtins.filter (node: node.role or "spoke" == "hub") nodes),
  mesh ? [ "10.84.0.0/24" ],
  # What names in DNS are below.
  domain ? "vault.example",
  spokeguard ? ../module.nix,
}:
let
  spokes = builtins.filter (node: node.hostname != hub.hostname) nodes;
  # An inventory may have several.
  addresses = node: node.mesh_address or [ node.wg_ip ];
  byName =
    value: list:
    builtins.listToAttrs (
      map (node: {
        name = node.hostname;
        value = value node;
      }) list
    );

  spoke =
    node@{
      hostname,
      region,
      subdomain ? hostname,
      domains ? [ "${subdomain}.${domain}" ],
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
        wireguard.privateKeyFile = "/etc/wireguard/wg0.key";
        settings = {
          mesh.address = addresses node;
          mesh.prefix = mesh;
          mesh.hub = {
            address = addresses hub;
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
        environment.VAULT_DOMAIN = builtins.head domains;
        environment.VAULT_REGION = region;
        serviceConfig.EnvironmentFile = "/etc/vault/production.env";
        serviceConfig.ExecStart = "/var/lib/vault/vault";
      };
    };
in
byName spoke spokes
// {
  ${hub.hostname} = {
    imports = [ spokeguard ];
    networking.hostName = hub.hostname;

    services.prometheus.enable = true;
    services.spokeguard = {
      enable = true;
      profile = "hub";
      wireguard.privateKeyFile = "/etc/wireguard/wg0.key";
      hub.spokes = byName (node: {
        address = addresses node;
        publicKey = node.public_key;
      }) spokes;
      settings = {
        mesh.address = addresses hub;
        mesh.prefix = mesh;
        # A hub has none by default; this fleet keeps its tunnels open from both ends.
        mesh.keepalive = "25s";
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
