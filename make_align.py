import torch
from pathlib import Path
from microdit.data.latents import EncodedSet
from microdit.encoders.autoencoder import load_autoencoder
from microdit.evaluation.features import EfficientNetLite0
from microdit.data.pixels import to_image, to_tensor
net = EfficientNetLite0(); m = net._model
print([n for n,_ in m.named_children()])
blocks = m._blocks
print(len(blocks))
def middle(x):
    x = m._relu(m._bn0(m._conv_stem(x))) if hasattr(m,'_relu') else m._swish(m._bn0(m._conv_stem(x)))
    for i, b in enumerate(blocks):
        s = m._global_params.drop_connect_rate
        x = b(x)
        if x.shape[1] == 112 and i+1 < len(blocks) and blocks[i+1]._depthwise_conv.stride[0] == 2 or x.shape[1]==112 and i==10:
            return x
lat=[];feat=[]
for name in ("emoji","scenes"):
    s = EncodedSet(Path("data")/name)
    ae = load_autoencoder(s.card["autoencoder"]["name"])
    n=len(s)
    L = torch.cat([s.latents([s.read(0,i)[0] for i in range(a,min(a+64,n))],0) for a in range(0,n,64)])
    for a in range(0,n,32):
        with torch.no_grad():
            px = ae.decode(L[a:a+32])
            big = torch.stack([to_tensor(to_image(p),224) for p in px])
            x = ((big+1)/2-net._mean)/net._std
            f = middle(x)
        f = torch.nn.functional.adaptive_avg_pool2d(f,4).flatten(2).mT
        feat.append(f.clone())
    lat.append(L); print(name,n,f.shape)
F = torch.cat(feat); F = (F-F.mean((0,1)))/F.std((0,1))
torch.save({"latents":torch.cat(lat),"features":F.contiguous()},"align.pt")
